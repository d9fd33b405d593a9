"""Batch normalisation folded into weights, against the formula of batch normalisation itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.delta import LAYOUTS, delta
from lorac_runtime.folding import fold_bias, fold_conv, fold_factor, fold_rows, refold_weight, scale_rows

EPS = 1e-3
SEEDS = st.integers(0, 2**32 - 1)


def statistics(rng: np.random.Generator, channels: int) -> tuple[np.ndarray, ...]:
    """gamma, beta, mean, var of a batch normalisation; gamma of either sign."""
    gamma = rng.uniform(0.3, 2, channels) * rng.choice([-1, 1], channels)
    spread = rng.uniform(0.1, 3, channels)
    return tuple(v.astype(np.float32) for v in (gamma, rng.normal(size=channels), rng.normal(size=channels), spread))


def normalised(y: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Batch normalisation of (positions, channels) in evaluation mode, as textbooks have it."""
    return (y - mean) / np.sqrt(var.astype(np.float64) + EPS) * gamma + beta


@given(seed=SEEDS, channels=st.integers(1, 6), kernel=st.sampled_from([(1,), (3,), (1, 1), (3, 2)]))
def test_a_folded_convolution_gives_what_convolution_and_batchnorm_gave(
    seed: int, channels: int, kernel: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(channels, 3, *kernel)).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32) if seed % 2 else None
    norm = statistics(rng, channels)
    patches = rng.normal(size=(7, weight[0].size))  # a convolution is a product with unrolled patches
    folded, folded_bias = fold_conv(weight, bias, *norm, EPS)
    expected = normalised(patches @ weight.reshape(channels, -1).T + (0 if bias is None else bias), *norm)
    found = patches @ folded.reshape(channels, -1).T + folded_bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert folded.dtype == folded_bias.dtype == np.float32
    assert folded.shape == weight.shape


def test_the_factor_is_computed_in_float64() -> None:
    gamma, var = np.float32([1 / 3, 0.7]), np.float32([1e-7, 123.4])
    factor = fold_factor(gamma, var, 1e-5)
    assert factor.dtype == np.float64
    np.testing.assert_allclose(factor, gamma.astype(float) * (var.astype(float) + 1e-5) ** -0.5, rtol=1e-15)


@pytest.mark.parametrize("var", [[-1.0, 1.0], [1.0, np.nan]])
def test_an_impossible_variance_is_refused(var: list[float]) -> None:
    with pytest.raises(ValueError, match="variance"):
        fold_factor(np.ones(2), np.array(var), 1e-5)


@given(seed=SEEDS, layout=st.sampled_from(LAYOUTS), k_h=st.integers(1, 3), k_w=st.integers(1, 3))
def test_scaling_the_rows_of_lora_b_folds_the_delta_in_both_layouts(seed: int, layout: str, k_h: int, k_w: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (5, 2, k_h, k_w)
    a, b = rng.normal(size=(4, 2 * k_w)), rng.normal(size=(5 * k_h, 4))
    gamma, _, _, var = statistics(rng, 5)
    factor = gamma / np.sqrt(var.astype(float) + EPS)
    expected = factor.reshape(5, 1, 1, 1) * delta(a, b, shape, 0.5, layout)
    found = delta(a, scale_rows(b, fold_factor(gamma, var, EPS), k_h).astype(float), shape, 0.5, layout)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_belong_to_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7 rows, expected 3 output channels \* k_h 2"):
        scale_rows(np.ones((7, 1)), np.ones(3), 2)


@given(seed=SEEDS)
def test_refolding_is_folding_anew(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 2, 3, 3)).astype(np.float32)
    old, new = rng.uniform(0.1, 2, 6), rng.uniform(0.1, 2, 6) * rng.choice([-1, 1], 6)
    found = refold_weight(fold_rows(weight, old), old, new)
    np.testing.assert_allclose(found, new.reshape(6, 1, 1, 1) * weight, rtol=1e-6)
    np.testing.assert_allclose(refold_weight(fold_rows(weight, old), old, np.ones(6)), weight, rtol=1e-6)


def test_rows_lost_in_folding_come_back_from_the_rows_that_were_kept() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 1, 1)).astype(np.float32)
    old, new = np.array([1.0, 0.0, 2.0, 1e-300]), np.array([3.0, 4.0, 5.0, 6.0])
    index = np.array([3, 1])
    found = refold_weight(fold_rows(weight, old), old, new, weight[index], index)
    np.testing.assert_allclose(found, new.reshape(4, 1, 1, 1) * weight, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rows \[1\] were multiplied by zero"):
        refold_weight(fold_rows(weight, old), old, new)


def test_a_lone_batchnorm_becomes_scale_and_shift() -> None:
    rng = np.random.default_rng(0)
    gamma, beta, mean, var = statistics(rng, 4)
    x = rng.normal(size=(9, 4))
    factor = fold_factor(gamma, var, EPS)
    found = x * factor + fold_bias(None, factor, beta, mean)
    np.testing.assert_allclose(found, normalised(x, gamma, beta, mean, var), rtol=1e-5, atol=1e-6)
