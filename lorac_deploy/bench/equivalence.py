"""Are two things equally fast? An equivalence test on paired observations, which can also say that it cannot tell.

Two one-sided t tests (Schuirmann 1987) on the logarithms of the observations' ratios: "same" needs the whole confidence
interval of the mean ratio within the margin. "different" needs the mean beyond the margin, and a wider interval that
leaves out 1: a suite asks of so many files that one in ten must not be called slower by chance. Everything else is
"too noisy". A percentile bootstrap of the mean stands beside it; it decides nothing.
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
SURE = 0.99  # of the one that "different" rests on
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


def equivalence(ratios: Sequence[float], *, margin: float = MARGIN, looks: int = 1) -> Equivalence:
    """What ``ratios``, one for each independent observation, say about the two.

    ``looks``: how often the question is asked as observations come in; each time is stricter by that (Bonferroni).

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
    mean, confidence = statistics.fmean(logs), _stricter(CONFIDENCE, looks)
    reach, wide = _reach(logs, confidence), _reach(logs, _stricter(SURE, looks))
    decided = _verdict(mean, reach, wide, math.log(1 + margin))
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return Equivalence(math.exp(mean), low, high, margin, len(ratios), decided, _bootstrap(logs, confidence))


def _stricter(confidence: float, looks: int) -> float:
    return 1 - (1 - confidence) / looks


def _reach(logs: Sequence[float], confidence: float) -> float:
    """Half the confidence interval of the mean."""
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    return float(stats.t.ppf(0.5 + confidence / 2, len(logs) - 1)) * error


def _verdict(mean: float, reach: float, wide: float, margin: float) -> Verdict:
    """All on the scale of logarithms."""
    if abs(mean) + reach <= margin:
        return "same"
    return "different" if abs(mean) > max(wide, margin) else "too noisy"


def _bootstrap(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentiles of the mean ratio over resampled observations, with a fixed seed."""
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return math.exp(low), math.exp(high)
