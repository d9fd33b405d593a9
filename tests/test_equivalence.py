"""The equivalence test of benchmarks: it must be able to say each of its three words, at the known rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lorac_deploy.bench.contest import Effort
from lorac_deploy.bench.equivalence import equivalence, hopeless

LOOKS = Effort().looks


def rounds(ratio: float, spread: float, count: int, *, seed: int) -> list[float]:
    """Ratios of rounds whose logarithms are normal."""
    return list(np.exp(np.random.default_rng(seed).normal(np.log(ratio), spread, count)))


def test_two_equal_things_are_the_same_when_the_rounds_are_quiet():
    assert equivalence(rounds(1.0, 0.01, 60, seed=0)).verdict == "same"


def test_equal_things_on_a_loud_machine_are_not_called_anything():
    assert equivalence(rounds(1.0, 0.2, 20, seed=0)).verdict == "too noisy"


@pytest.mark.parametrize("ratio", [1.03, 0.97])
def test_three_per_cent_are_a_difference_in_either_direction(ratio: float):
    assert equivalence(rounds(ratio, 0.01, 60, seed=0)).verdict == "different"


def test_a_difference_at_the_margin_is_called_the_same_in_one_run_of_twenty_at_most():
    verdicts = [equivalence(rounds(1.01, 0.01, 30, seed=s)).verdict for s in range(400)]
    assert verdicts.count("same") / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_interval_of_few_is_that_of_a_t_test_on_logarithms():
    values = rounds(1.02, 0.05, 4, seed=3)
    found = equivalence(values)
    low, high = stats.t.interval(0.9, 3, np.mean(np.log(values)), stats.sem(np.log(values)))
    np.testing.assert_allclose([found.low, found.high], np.exp([low, high]), rtol=1e-12)


@pytest.mark.parametrize("count", [5, 10, 15, 20])
def test_the_interval_of_more_is_that_of_a_trimmed_mean(count: int):
    values = rounds(1.02, 0.05, count, seed=3)
    found = equivalence(values)
    low, high = stats.mstats.trimmed_mean_ci(np.log(values), (0.2, 0.2), alpha=0.1)
    np.testing.assert_allclose([found.low, found.high], np.exp([low, high]), rtol=1e-12)
    assert found.ratio == pytest.approx(np.exp(stats.trim_mean(np.log(values), 0.2)), rel=1e-12)


def spoilt(ratio: float, seed: int) -> list[float]:
    """16 ratios, of which some, one in eight, are off by 4 %."""
    rng = np.random.default_rng(seed)
    off = np.where(rng.random(16) < 1 / 8, rng.choice([-0.04, 0.04], 16), 0.0)
    return list(np.exp(np.log(ratio) + rng.normal(0, 0.004, 16) + off))


def test_a_few_spoilt_observations_do_not_hide_that_two_things_are_the_same():
    runs = [spoilt(1.0, seed) for seed in range(400)]
    assert sum(equivalence(run, looks=3).verdict == "same" for run in runs) / 400 > 0.9


def test_with_spoilt_observations_too_one_run_of_twenty_at_most_is_called_the_same_at_the_margin():
    runs = [spoilt(1.01, seed) for seed in range(400)]
    wrong = sum(any(equivalence(run[:n], looks=3).verdict == "same" for n in LOOKS) for run in runs)
    assert wrong / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("values", [[1.0, 1.0], [], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0]])
def test_too_few_or_impossible_ratios_are_refused(values: list[float]):
    with pytest.raises(ValueError, match="at least 3 positive ratios"):
        equivalence(values)


def test_more_looks_make_each_of_them_stricter_by_bonferroni():
    values = rounds(1.0, 0.01, 10, seed=1)
    found = equivalence(values, looks=3)
    low, high = stats.mstats.trimmed_mean_ci(np.log(values), (0.2, 0.2), alpha=0.1 / 3)
    np.testing.assert_allclose([found.low, found.high], np.exp([low, high]), rtol=1e-12)


def test_the_bootstrap_agrees_with_the_t_interval_on_many_observations():
    found = equivalence(rounds(1.02, 0.05, 400, seed=2))
    np.testing.assert_allclose(found.bootstrap, [found.low, found.high], atol=1e-3)
    assert found.bootstrap == equivalence(rounds(1.02, 0.05, 400, seed=2)).bootstrap, "its seed is fixed"


def test_a_difference_that_is_asked_for_three_times_is_still_called_the_same_in_one_run_of_twenty_at_most():
    wrong = sum(
        any(equivalence(rounds(1.01, 0.01, 16, seed=s)[:n], looks=3).verdict == "same" for n in LOOKS)
        for s in range(400)
    )
    assert wrong / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_equal_things_are_called_different_once_in_a_hundred_runs_at_most(spread: float):
    runs = [rounds(1.0, spread, 16, seed=s) for s in range(400)]
    wrong = sum(any(equivalence(run[:n], looks=3).verdict == "different" for n in LOOKS) for run in runs)
    assert wrong / 400 <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 400)


@pytest.mark.parametrize(("ratio", "spread"), [(1.0, 0.008), (1.0, 0.01), (1.03, 0.02)])
def test_giving_up_after_eight_loses_few_verdicts_of_sixteen(ratio: float, spread: float):
    runs = [rounds(ratio, spread, 16, seed=s) for s in range(400)]
    judged = [run for run in runs if equivalence(run, looks=3).verdict != "too noisy"]
    lost = [run for run in judged if hopeless(run[:8], 16, looks=3)]
    assert len(judged) > 200
    assert len(lost) / len(judged) < 0.1


@pytest.mark.parametrize(("ratio", "spread"), [(1.0, 0.02), (1.0, 0.04), (1.015, 0.03)])
def test_what_is_given_up_after_eight_has_hardly_a_verdict_after_sixteen(ratio: float, spread: float):
    runs = [rounds(ratio, spread, 16, seed=s) for s in range(400)]
    given_up = [run for run in runs if hopeless(run[:8], 16, looks=3)]
    kept = [run for run in given_up if equivalence(run, looks=3).verdict != "too noisy"]
    assert len(given_up) > 200
    assert len(kept) / len(given_up) < 0.1


def test_what_does_not_spread_is_not_given_up():
    assert not hopeless([1.0, 1.0, 1.0, 1.0], 16)
