"""Are two things equally fast? An equivalence test on paired observations, which can also say that it cannot tell.

Two one-sided t tests (Schuirmann 1987) on the logarithms of the observations' ratios: "same" needs the whole confidence
interval of the mean ratio within the margin. The mean is a trimmed one (Tukey and McLaughlin 1963): now and then an
observation is spoilt by some per cent, so the largest and the smallest fifth are left out.
"different" needs the mean beyond the margin, and a wider interval that leaves out 1: a suite asks of so many files that
one in ten must not be called slower by chance. Everything else is "too noisy". A percentile bootstrap of the mean
stands beside it; it decides nothing.
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
TRIMMED = 0.2  # share of the observations on each side, rounded down: none of four, one of eight, three of sixteen
RESAMPLES = 2000
FAINT = 0.1  # the chance of a verdict below which it is not worth waiting for


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The (trimmed) mean ratio of paired observations, its confidence interval, and what follows for the ``margin``.

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
    logs, confidence = [math.log(ratio) for ratio in ratios], _stricter(CONFIDENCE, looks)
    mean, spread = _trimmed(logs)
    reach, wide = (_reach(spread, len(logs), c) for c in (confidence, _stricter(SURE, looks)))
    decided = _verdict(mean, reach, wide, math.log(1 + margin))
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return Equivalence(math.exp(mean), low, high, margin, len(ratios), decided, _bootstrap(logs, confidence))


def hopeless(ratios: Sequence[float], most: int, *, margin: float = MARGIN, looks: int = 1) -> bool:
    """Whether ``most`` observations in all would hardly bring a verdict, if they go on like these.

    Stochastic curtailment (Lan, Simon and Halperin 1982): given the mean so far, and a spread at the lower quartile of
    what it may be, "same" and "different" are each less likely than `FAINT` after ``most``. To stop for this reason
    makes neither verdict more frequent.

    >>> quiet, loud = [1.002, 0.998, 1.001, 0.999], [1.05, 0.95, 1.04, 0.96]
    >>> hopeless(quiet, 16), hopeless(loud, 16)
    (False, True)
    """
    logs, limit = [math.log(ratio) for ratio in ratios], math.log(1 + margin)
    mean, spread = _trimmed(logs)
    freedom = len(logs) - 2 * _cut(len(logs)) - 1
    spread *= math.sqrt(freedom / stats.chi2.ppf(0.75, freedom))
    to_come = stats.norm(mean, max(_error(spread, most) * math.sqrt(1 - len(logs) / most), math.ulp(1.0)))
    reach, wide = (_reach(spread, most, _stricter(c, looks)) for c in (CONFIDENCE, SURE))
    room, beyond = max(0.0, limit - reach), max(limit, wide)
    same = to_come.cdf(room) - to_come.cdf(-room)
    different = to_come.cdf(-beyond) + to_come.sf(beyond)
    return bool(max(same, different) < FAINT)


def _stricter(confidence: float, looks: int) -> float:
    return 1 - (1 - confidence) / looks


def _trimmed(values: Sequence[float]) -> tuple[float, float]:
    """(mean without the largest and smallest, standard deviation with these replaced by the next ones)."""
    ordered, cut = sorted(values), _cut(len(values))
    kept = ordered[cut : len(ordered) - cut]
    return statistics.fmean(kept), statistics.stdev([*kept[:1] * cut, *kept, *kept[-1:] * cut])


def _cut(count: int) -> int:
    return int(TRIMMED * count)


def _error(spread: float, count: int) -> float:
    """Standard error of a trimmed mean of ``count`` observations."""
    return spread * math.sqrt(count) / (count - 2 * _cut(count))


def _reach(spread: float, count: int, confidence: float) -> float:
    """Half the confidence interval of a trimmed mean."""
    freedom = count - 2 * _cut(count) - 1
    return float(stats.t.ppf(0.5 + confidence / 2, freedom)) * _error(spread, count)


def _verdict(mean: float, reach: float, wide: float, margin: float) -> Verdict:
    """All on the scale of logarithms."""
    if abs(mean) + reach <= margin:
        return "same"
    return "different" if abs(mean) > max(wide, margin) else "too noisy"


def _bootstrap(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentiles of the trimmed mean ratio over resampled observations, with a fixed seed."""
    rng = np.random.default_rng(0)
    means = stats.trim_mean(rng.choice(logs, (RESAMPLES, len(logs))), TRIMMED, axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return math.exp(low), math.exp(high)
