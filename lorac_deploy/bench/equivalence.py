"""Are two things equally fast? An equivalence test on paired rounds, which can also say that it cannot tell.

Two one-sided t tests (Schuirmann 1987) on the logarithms of the rounds' ratios: "same" needs the whole 90 %
confidence interval of the mean ratio within the margin, "different" needs it wholly outside of 1 and the mean
beyond the margin; everything else is "too noisy".
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from scipy import stats

Verdict = Literal["same", "different", "too noisy"]
MARGIN = 0.01
CONFIDENCE = 0.90


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The mean ratio of paired rounds, its confidence interval, and what follows for the ``margin``."""

    ratio: float
    low: float
    high: float
    margin: float
    rounds: int
    verdict: Verdict


def equivalence(ratios: Sequence[float], *, margin: float = MARGIN) -> Equivalence:
    """What ``ratios``, one for each round, say about the two.

    >>> equivalence([1.001, 0.999, 1.002, 0.998, 1.0, 1.001]).verdict
    'same'
    >>> equivalence([1.05, 1.06, 1.05, 1.07, 1.04, 1.06]).verdict
    'different'
    >>> equivalence([0.9, 1.1, 1.0, 1.2, 0.8, 1.05]).verdict
    'too noisy'

    Raises ValueError for fewer than three rounds, or a ratio that is not positive.
    """
    if len(ratios) < 3 or min(ratios) <= 0:
        raise ValueError(f"an equivalence test needs at least 3 positive ratios, got {list(ratios)}")
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1)) * error
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return Equivalence(math.exp(mean), low, high, margin, len(ratios), _verdict(math.exp(mean), low, high, margin))


def _verdict(ratio: float, low: float, high: float, margin: float) -> Verdict:
    least, most = 1 / (1 + margin), 1 + margin
    if least <= low and high <= most:
        return "same"
    if not low <= 1 <= high and not least <= ratio <= most:
        return "different"
    return "too noisy"
