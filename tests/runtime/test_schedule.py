"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.schedule import one_cycle


@given(total=st.integers(1, 400), peak=st.floats(1e-6, 10), warmup=st.floats(0, 1))
def test_the_rate_rises_straight_then_falls_and_is_never_zero(total: int, peak: float, warmup: float) -> None:
    rates = [one_cycle(step, total, peak=peak, warmup=warmup) for step in range(total)]
    rising = round(warmup * total)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step in range(rising):
        assert rates[step] == pytest.approx(peak * (step + 1) / rising)
    falling = rates[max(rising - 1, 0) :]
    assert falling == sorted(falling, reverse=True)


def test_the_fall_is_half_a_cosine_that_ends_near_zero() -> None:
    rates = [one_cycle(step, 1000, peak=2.0, warmup=0.3) for step in range(1000)]
    assert rates[299] == 2.0
    assert rates[650] == pytest.approx(1.0, abs=0.01)
    assert rates[474] == pytest.approx(1 + math.cos(math.pi / 4), abs=0.01)
    assert rates[-1] < 2e-5


def test_one_step_in_all_trains() -> None:
    assert one_cycle(0, 1, peak=1.0, warmup=0.3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("step", "total", "peak", "warmup", "message"),
    [
        (5, 5, 1.0, 0.3, "step 5"),
        (-1, 5, 1.0, 0.3, "step -1"),
        (0, 0, 1.0, 0.3, "0 steps"),
        (0, 5, 0.0, 0.3, "peak"),
        (0, 5, math.nan, 0.3, "peak"),
        (0, 5, math.inf, 0.3, "peak"),
        (0, 5, 1.0, 1.1, "warmup"),
        (0, 5, 1.0, -0.1, "warmup"),
    ],
)
def test_impossible_schedules_are_refused(step: int, total: int, peak: float, warmup: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_cycle(step, total, peak=peak, warmup=warmup)
