"""The low-rank delta in numpy, against the published formulas; torch's turn is in tests/test_delta_torch.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.delta import (
    LAYOUTS,
    adapter_rank,
    adapter_shapes,
    adapter_size,
    arrange,
    conv_dims,
    delta,
    is_smaller_than_weight,
    resolve_rank_mode,
)

WEIGHTS = st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 4)] * 2)


def factors(shape: tuple[int, ...], rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape_a, shape_b = adapter_shapes(shape, rank)
    return rng.normal(size=shape_a), rng.normal(size=shape_b)


def by_formula(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """Element by element, as docs of the method have it."""
    _, c_in, k_h, k_w = shape
    result = np.zeros(shape)
    for o, i, u, v in np.ndindex(*shape):
        n = (i * k_h + u) * k_w + v
        paper = (o * k_h + n // (c_in * k_w), n % (c_in * k_w))
        row, column = (o * k_h + u, i * k_w + v) if layout == "spatial" else paper
        result[o, i, u, v] = b[row] @ a[:, column]
    return result


@given(shape=WEIGHTS, rank=st.integers(1, 4), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 999))
def test_every_element_is_what_the_formula_says(shape: tuple[int, ...], rank: int, layout: str, seed: int) -> None:
    a, b = factors(shape, rank, seed)
    np.testing.assert_allclose(delta(a, b, shape, 1.5, layout), 1.5 * by_formula(a, b, shape, layout), atol=1e-12)


@given(shape=WEIGHTS, seed=st.integers(0, 999))
def test_the_layouts_arrange_the_same_numbers_in_different_places(shape: tuple[int, ...], seed: int) -> None:
    a, b = factors(shape, 2, seed)
    paper, spatial = (delta(a, b, shape, 1.0, layout) for layout in ("paper", "spatial"))
    np.testing.assert_array_equal(np.sort(paper, axis=None), np.sort(spatial, axis=None))
    one_place = shape[1] == 1 or shape[2] == 1
    assert np.array_equal(paper, spatial) == one_place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_one_dimensional_kernel_counts_as_one_row(layout: str) -> None:
    a, b = factors((4, 3, 5), 2, 0)
    flat = delta(a, b, (4, 3, 5), 2.0, layout)
    assert flat.shape == (4, 3, 5)
    np.testing.assert_array_equal(flat, delta(a, b, (4, 3, 1, 5), 2.0, layout)[:, :, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_delta_is_linear_in_lora_b_and_zero_at_zero(layout: str) -> None:
    a, b = factors((4, 3, 3, 3), 5, 0)
    assert not np.any(delta(a, 0 * b, (4, 3, 3, 3), 2.0, layout))
    twice = delta(a, 2 * b, (4, 3, 3, 3), 1.0, layout)
    np.testing.assert_array_equal(twice, delta(a, b, (4, 3, 3, 3), 2.0, layout))
    assert np.all(twice != 0)


def test_float32_stays_float32() -> None:
    a, b = (x.astype(np.float32) for x in factors((4, 3, 3, 3), 5, 0))
    assert delta(a, b, (4, 3, 3, 3), 2.0, "spatial").dtype == np.float32


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="'rows' is not one of spatial, paper"):
        arrange(np.ones((4, 4)), (2, 2, 2, 2), "rows")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((2, 6), (12, 3)), ((2, 5), (12, 2)), ((2, 6), (11, 2)), ((6, 2), (2, 12))]
)
def test_factors_of_another_weight_are_refused(shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected \(rank, 6\) and \(12, rank\)"):
        delta(np.ones(shape_a), np.ones(shape_b), (4, 2, 3, 3), 1.0, "spatial")


@pytest.mark.parametrize("shape", [(4,), (4, 3, 3, 3, 3), ()])
def test_weights_of_other_layers_have_no_adapters(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"2, 3 or 4 dimensions, got shape \("):
        conv_dims(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fully_connected_layer_is_a_convolution_of_one_tap(layout: str) -> None:
    a, b = factors((4, 3), 2, 0)
    flat = delta(a, b, (4, 3), 2.0, layout)
    np.testing.assert_array_equal(flat, delta(a, b, (4, 3, 1, 1), 2.0, layout)[:, :, 0, 0])
    np.testing.assert_allclose(flat, 2.0 * b @ a)
    assert adapter_rank(4, (64, 32), "rk") == adapter_rank(4, (64, 32), "r") == 4


def pair_by_pair(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], layout: str, pairs: int) -> np.ndarray:
    """Each pair makes the update of its own output channels, as if they were a layer."""
    share, rows, rank = shape[0] // pairs, len(b) // pairs, b.shape[1]
    parts = [
        by_formula(a[p * rank : (p + 1) * rank], b[p * rows : (p + 1) * rows], (share, *shape[1:]), layout)
        for p in range(pairs)
    ]
    return np.concatenate(parts)


@given(
    shape=WEIGHTS, pairs=st.integers(1, 5), rank=st.integers(1, 4), layout=st.sampled_from(LAYOUTS), seed=st.integers()
)
def test_several_pairs_are_the_updates_of_their_own_channels(
    shape: tuple[int, ...], pairs: int, rank: int, layout: str, seed: int
) -> None:
    whole = (shape[0] * pairs, *shape[1:])
    rng = np.random.default_rng(abs(seed))
    a, b = (rng.normal(size=size) for size in adapter_shapes(whole, rank, pairs))
    found = delta(a, b, whole, 0.5, layout, pairs=pairs)
    np.testing.assert_allclose(found, 0.5 * pair_by_pair(a, b, whole, layout, pairs), atol=1e-12)


@pytest.mark.parametrize(("c_out", "c_in", "k", "r"), [(64, 64, 3, 1), (64, 64, 3, 2), (128, 64, 5, 4), (10, 6, 3, 64)])
def test_a_pair_for_each_kernel_has_as_many_parameters_as_the_paper_says(c_out: int, c_in: int, k: int, r: int) -> None:
    shape = (c_out, c_in, k, k)
    assert adapter_size(shape, r, c_out) == c_out * (c_in * r * k + r * k)
    assert is_smaller_than_weight(shape, r, c_out) == (r < k)


@pytest.mark.parametrize("pairs", [0, -1, 3, 8])
def test_pairs_must_share_the_output_channels_evenly(pairs: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs of factors cannot share 4 output channels"):
        adapter_shapes((4, 2, 3, 3), 1, pairs)


def test_factors_of_another_number_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(4 \* rank, 6\) and \(12, rank\)"):
        delta(np.ones((2, 6)), np.ones((12, 2)), (4, 2, 3, 3), 1.0, "spatial", pairs=4)


@given(shape=WEIGHTS, r=st.integers(1, 40), mode=st.sampled_from(["rk", "r"]))
def test_the_rank_is_what_the_mode_says_but_never_above_what_the_weight_can_hold(
    shape: tuple[int, ...], r: int, mode: str
) -> None:
    c_out, c_in, k_h, k_w = shape
    rank = adapter_rank(r, shape, mode)  # type: ignore[arg-type]
    wanted = {"rk": r * k_w, "r": r}[mode]
    possible = np.linalg.matrix_rank(np.random.default_rng(0).normal(size=(c_out * k_h, c_in * k_w)))
    assert rank == (wanted if wanted <= possible else possible)
    assert adapter_size(shape, rank) == sum(math.prod(s) for s in adapter_shapes(shape, rank))
    assert is_smaller_than_weight(shape, rank) == (adapter_size(shape, rank) < math.prod(shape))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        adapter_rank(0, (4, 4, 3, 3), "rk")


def test_auto_mode_switches_between_resnet34_and_resnet50() -> None:
    assert resolve_rank_mode("auto", 21_279_232) == "rk"
    assert resolve_rank_mode("auto", 23_500_352) == "r"
    assert resolve_rank_mode("r", 1) == "r"
    assert resolve_rank_mode("rk", 10**9) == "rk"
    with pytest.raises(ValueError, match="'best' is not one of auto, rk, r"):
        resolve_rank_mode("best", 1)  # type: ignore[arg-type]


def resnet_convolutions(blocks: tuple[int, ...], bottleneck: bool) -> list[tuple[int, ...]]:
    """Weight shapes of a torchvision ResNet's convolutions behind the stem."""
    shapes: list[tuple[int, ...]] = []
    c_in = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        c_out = width * 4 if bottleneck else width
        for block in range(count):
            if bottleneck:
                shapes += [(width, c_in, 1, 1), (width, width, 3, 3), (c_out, width, 1, 1)]
            else:
                shapes += [(width, c_in, 3, 3), (width, width, 3, 3)]
            if block == 0 and c_in != c_out:
                shapes.append((c_out, c_in, 1, 1))
            c_in = c_out
    return shapes


# The published table, in thousands: ranks 1, 2, 4, ... 64, stem and head of 10 classes trained in full.
PUBLISHED = {
    "resnet18 rk": ((2, 2, 2, 2), False, [73, 140, 273, 538, 1070, 2133, 4258]),
    "resnet18 r": ((2, 2, 2, 2), False, [30, 53, 99, 191, 375, 744, 1481]),
    "resnet34 rk": ((3, 4, 6, 3), False, [140, 273, 540, 1073, 2139, 4271, 8535]),
    "resnet50 r": ((3, 4, 6, 3), True, [86, 150, 279, 535, 1048, 2074, 4126]),
    "resnet101 r": ((3, 4, 23, 3), True, [156, 290, 557, 1092, 2162, 4303, 8583]),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_trained_parameters_are_those_of_the_published_table(case: str) -> None:
    blocks, bottleneck, thousands = PUBLISHED[case]
    mode = case.split()[1]
    features = 2048 if bottleneck else 512
    for exponent, expected in enumerate(thousands):
        sizes = [
            adapter_size(shape, adapter_rank(2**exponent, shape, mode))  # type: ignore[arg-type]
            for shape in resnet_convolutions(blocks, bottleneck)
        ]
        assert round((64 * 3 * 9 + features * 10 + sum(sizes)) / 1000) == expected
