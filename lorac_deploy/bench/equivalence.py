"""Are two things equally fast? An equivalence test on paired observations, which can also say that it cannot tell.

Two one-sided t tests (Schuirmann 1987) on the logarithms of the observations' ratios: "same" needs the whole confidence
interval of the mean ratio within the margin, "different" needs it wholly outside of 1 and the mean beyond the margin;
everything else is "too noisy". A percentile bootstrap of the mean stands beside it; it decides nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["same", "different", "too noisy"]
MARGIN = 0.01
CONFIDENCE = 0.90  # of the interval: 5 % on each side
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The mean ratio of paired observations, its confidence interval, and what follows for the ``margin``.

    ``bootstrap`` is the interval of the same mean by resampling.
    """

    ratio: float
    low: float
    high: float
    margin: float
    observations: int
    verdict: Verdict
    bootstrap: tuple[float, float]


def equivalence(ratios: Sequence[float], *, margin: float = MARGIN, confidence: float = CONFIDENCE) -> Equivalence:
    """What ``ratios``, one for each independent observation, say about the two.

    >>> equivalence([1.001, 0.999, 1.002, 0.998, 1.0, 1.001]).verdict
    'same'
    >>> equivalence([1.05, 1.06, 1.05, 1.07, 1.04, 1.06]).verdict
    'different'
    >>> equivalence([0.9, 1.1, 1.0, 1.2, 0.8, 1.05]).verdict
    'too noisy'

    Raises ValueError for fewer than three observations, or a ratio that is not positive.
    """
    if len(ratios) < 3 or min(ratios) <= 0:
        raise ValueError(f"an equivalence test needs at least 3 positive ratios, got {list(ratios)}")
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(logs) - 1)) * error
    ratio, low, high = (math.exp(value) for value in (mean, mean - reach, mean + reach))
    decided = _verdict(ratio, low, high, margin)
    return Equivalence(ratio, low, high, margin, len(ratios), decided, _bootstrap(logs, confidence))


def at_looks(ratios: Sequence[float], looks: int, *, margin: float = MARGIN) -> Equivalence:
    """`equivalence` where the same question is asked ``looks`` times as observations come in (Bonferroni).

    >>> ratios = [1.001, 0.993, 1.006, 0.998, 1.0, 1.004]
    >>> at_looks(ratios, 3).high > equivalence(ratios).high
    True
    """
    return equivalence(ratios, margin=margin, confidence=1 - (1 - CONFIDENCE) / looks)


def _verdict(ratio: float, low: float, high: float, margin: float) -> Verdict:
    least, most = 1 / (1 + margin), 1 + margin
    if least <= low and high <= most:
        return "same"
    if not low <= 1 <= high and not least <= ratio <= most:
        return "different"
    return "too noisy"


def _bootstrap(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentiles of the mean ratio over resampled observations, with a fixed seed."""
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return math.exp(low), math.exp(high)
