"""The int8 formulas: how far a stored number may be from the real one, and that blocks give the bits of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.quantization import (
    bias_scales,
    peaks,
    quantized_bias,
    quantized_weight,
    scales_of,
    weight_scales,
)

SEEDS = st.integers(0, 2**32 - 1)
INPUT_SCALE = 0.037


def layer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (6, 4, 3, 2) whose channels differ in size by powers of ten, and bias (6,)."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-4, 3, 6)
    weight = rng.normal(size=(6, 4, 3, 2)) * size.reshape(6, 1, 1, 1)
    return weight.astype(np.float32), (rng.normal(size=6) * 10.0 ** rng.uniform(-6, 3, 6)).astype(np.float32)


@given(seed=SEEDS, axis=st.sampled_from([0, 1, -1, None]))
def test_a_stored_weight_is_within_half_a_step_of_the_real_one(seed: int, axis: int | None) -> None:
    weight, _ = layer(seed)
    scales = weight_scales(weight, axis, None, INPUT_SCALE)
    assert scales.shape == (1 if axis is None else weight.shape[axis],)
    stored = quantized_weight(weight, scales, axis).astype(np.float64)
    steps = scales.astype(np.float64).reshape([-1 if i == (axis or 0) % 4 else 1 for i in range(4)])
    assert np.all(np.abs(stored * steps - weight) <= 0.5001 * steps)
    assert np.abs(stored).max() <= 127


@given(seed=SEEDS)
def test_the_largest_magnitude_of_each_channel_uses_all_of_int8(seed: int) -> None:
    weight, _ = layer(seed)
    stored = quantized_weight(weight, weight_scales(weight, 0, None, INPUT_SCALE), 0)
    assert np.all(np.abs(stored.reshape(6, -1).astype(int)).max(axis=1) == 127)


@given(seed=SEEDS, block=st.integers(1, 5))
def test_blocks_of_output_channels_give_the_bits_of_the_whole(seed: int, block: int) -> None:
    weight, bias = layer(seed)
    whole = quantized(weight, bias)
    parts = [quantized(weight[i : i + block], bias[i : i + block]) for i in range(0, 6, block)]
    for index, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[index] for part in parts]), expected)


def quantized(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scales, weight, bias scales and bias as they are stored."""
    scales = weight_scales(weight, 0, bias, INPUT_SCALE)
    bias_steps = bias_scales(scales, INPUT_SCALE)
    return scales, quantized_weight(weight, scales, 0), bias_steps, quantized_bias(bias, bias_steps)[0]


@given(seed=SEEDS, block=st.integers(1, 5))
def test_one_scale_per_tensor_can_be_had_from_blocks_too(seed: int, block: int) -> None:
    weight, bias = layer(seed)
    joined = np.zeros(1, np.float32)
    for i in range(0, 6, block):
        joined = np.maximum(joined, peaks(weight[i : i + block], None))
    expected = weight_scales(weight, None, bias, INPUT_SCALE)
    np.testing.assert_array_equal(scales_of(joined, peaks(bias, None), INPUT_SCALE), expected)
    assert expected.shape == (1,)


@given(seed=SEEDS, axis=st.sampled_from([0, None]))
def test_a_bias_never_saturates_with_the_scales_of_its_layer(seed: int, axis: int | None) -> None:
    weight, bias = layer(seed)
    bias = bias * np.float32(1e9)
    steps = bias_scales(weight_scales(weight, axis, bias, INPUT_SCALE), INPUT_SCALE)
    stored, saturated = quantized_bias(bias, steps)
    assert saturated == 0
    assert np.all(np.abs(stored * steps.astype(np.float64) - bias) <= 0.5001 * steps)
    without = bias_scales(weight_scales(weight * np.float32(1e-9), axis, None, INPUT_SCALE), INPUT_SCALE)
    assert quantized_bias(bias, without)[1] > 0, "without the guard this bias would have been cut off"


def test_a_bias_beyond_32_bits_is_cut_off_and_counted() -> None:
    stored, saturated = quantized_bias(np.array([3e9, -3e9, 5.0]), np.ones(3, np.float32))
    np.testing.assert_array_equal(stored, np.int32([2**31 - 1, -(2**31), 5]))
    assert saturated == 2


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-45])
def test_a_dead_channel_gets_a_scale_that_is_a_normal_number(size: float) -> None:
    weight = np.full((2, 3), size, np.float32)
    scales = weight_scales(weight, 0, np.zeros(2), INPUT_SCALE)
    steps = bias_scales(scales, INPUT_SCALE)
    assert np.all(np.isfinite(scales))
    assert np.all(steps >= np.float32(2.0**-28))
    assert not quantized_weight(weight, scales, 0).any()


def test_rounding_is_to_the_even_neighbour_on_ties() -> None:
    stored = quantized_weight(np.float32([0.5, 1.5, 2.5, -0.5, -1.5]), np.ones(1, np.float32), None)
    np.testing.assert_array_equal(stored, [0, 2, 2, 0, -2])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_an_impossible_input_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        weight_scales(np.ones((2, 2)), 0, None, scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_have_no_int8_form(bad: float) -> None:
    weight = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="not finite"):
        weight_scales(np.float32([[1, bad], [1, 1]]), 0, None, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        weight_scales(weight, 0, np.float32([bad, 0]), 1.0)
