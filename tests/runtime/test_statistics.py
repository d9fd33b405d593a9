"""Running statistics against numpy's own variance, and trained tensors against the formula of BN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.engines.statistics import cumulative_average, moved_trained, samples, unbiased_running_var
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import BatchNorm

BN = BatchNorm("bn", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", 1e-5, 0.1, 4, ("c.weight", "c.bias"))


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_the_running_variance_moves_by_the_unbiased_variance(count: int, momentum: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, values = rng.uniform(0.1, 3, 5).astype(np.float32), rng.normal(0, 2, (count, 5))
    moved = ((1 - momentum) * old + momentum * values.var(axis=0)).astype(np.float32)
    found = unbiased_running_var(old, moved, momentum=momentum, count=count)
    np.testing.assert_allclose(found, (1 - momentum) * old + momentum * values.var(axis=0, ddof=1), rtol=2e-6 * count)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_every_batch_counts_the_same_in_the_average(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(1, 2, (size * BN.positions, 3)) for size in sizes]
    batches = [
        (size, {"bn.batch_mean": part.mean(0), "bn.batch_var": part.var(0)})
        for size, part in zip(sizes, parts, strict=True)
    ]
    found = cumulative_average((BN,), batches)
    np.testing.assert_allclose(found["bn.running_mean"], np.mean([p.mean(0) for p in parts], axis=0), rtol=1e-4)
    expected = np.mean([p.var(0, ddof=1) for p in parts], axis=0)
    np.testing.assert_allclose(found["bn.running_var"], expected, rtol=1e-5)


def test_one_value_per_channel_has_no_variance() -> None:
    flat = BatchNorm("bn", *["x"] * 4, 1e-5, 0.1, 1, ("w", "b"))
    assert samples(flat, 2) == 2
    with pytest.raises(DataError, match="bn sees one value per channel in a batch of 1 image"):
        samples(flat, 1)


def test_a_trained_bias_and_shift_move_as_their_unfolded_selves() -> None:
    """bias_folded = (bias - mean) g + beta, for the same unfolded bias before and after."""
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    gamma, beta, bias, mean, new_mean = rng.normal(0, 1, (5, 3)).astype(np.float32)
    var, new_var = rng.uniform(0.2, 2, (2, 3)).astype(np.float32)
    weight = rng.normal(0, 1, (3, 2, 1, 1)).astype(np.float32)
    old = {"bn.weight": gamma, "bn.bias": beta, "bn.running_mean": mean, "bn.running_var": var}
    new = old | {"bn.running_mean": new_mean, "bn.running_var": new_var}
    g, new_g = gamma / np.sqrt(var + 1e-5), gamma / np.sqrt(new_var + 1e-5)
    folded = {"c.weight": weight * g[:, None, None, None], "c.bias": (bias - mean) * g + beta, "other": weight}
    found = moved_trained(SimpleNamespace(adapters=(), partials=()), BN, folded, old=old, new=new)
    assert found.keys() == {"c.weight", "c.bias"}
    np.testing.assert_allclose(found["c.weight"], weight * new_g[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(found["c.bias"], (bias - new_mean) * new_g + beta, rtol=1e-4, atol=1e-6)
