"""Edges, distances and histograms against SciPy and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lorac_deploy.corruptions import edges

SIDES = st.tuples(st.integers(1, 14), st.integers(1, 14))


@given(SIDES, st.integers(0, 20), st.floats(0.0, 0.3), st.sampled_from([1.0, 2.5, 20.0]))
def test_distances_are_euclidean_up_to_the_limit(shape: tuple[int, int], seed: int, share: float, limit: float) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    expected = ndimage.distance_transform_edt(~mask) if mask.any() else np.full(shape, np.inf)
    np.testing.assert_allclose(edges.distance(mask, limit), np.minimum(expected, limit))


@given(SIDES, st.integers(0, 9))
def test_a_stencil_is_a_correlation(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    plane, kernel = rng.random(shape), rng.integers(-2, 3, (3, 3))
    expected = ndimage.correlate(plane, kernel.astype(float), mode="nearest")
    np.testing.assert_allclose(edges.stencil(plane, kernel, "edge"), expected, atol=1e-12)


@given(SIDES, st.integers(0, 9), st.integers(1, 256))
def test_equalizing_keeps_the_order_and_spreads_the_levels(shape: tuple[int, int], seed: int, top: int) -> None:
    plane = np.random.default_rng(seed).integers(0, top, shape).astype(float)
    found = edges.equalize(plane)
    if np.ptp(plane) == 0:
        np.testing.assert_array_equal(found, plane)
        return
    assert (found.min(), found.max()) == (0, 255)
    lowest = (plane == plane.min()).sum()
    for level in np.unique(plane):  # the rank of a level, the lowest ones not counted, is its share of 255
        share = ((plane <= level).sum() - lowest) / (plane.size - lowest)
        assert found[plane == level] == pytest.approx(255 * share, abs=0.5)


def test_the_edge_of_a_square_is_its_outline() -> None:
    plane = np.zeros((12, 12))
    plane[3:9, 3:9] = 100.0
    outline = np.zeros((12, 12), bool)
    outline[3:9, 3:9] = True
    outline[4:8, 4:8] = False
    found = edges.find_edges(plane, 50, 150)
    near = ndimage.binary_dilation(outline, np.ones((3, 3)))
    assert found.sum() >= 20
    assert not (found & ~near).any()
    assert not (outline & ~ndimage.binary_dilation(found, np.ones((3, 3)))).any()


def test_weak_edges_stay_where_they_join_strong_ones() -> None:
    heights = np.repeat([30.0, 100.0], [8, 8])  # gradients of 4 * 30 and 4 * 100
    joined = np.where(np.arange(10) >= 5, heights[:, None], 0.0)
    alone = joined[:7]
    assert edges.find_edges(joined, 50, 150).any(axis=1).all()
    assert not edges.find_edges(alone, 50, 150).any()
    assert not edges.find_edges(joined, 50, 1000).any()
    assert edges.find_edges(joined, 130, 150).any(axis=1).sum() < 11


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_edges_turn_with_the_image(turns: int) -> None:
    plane = ndimage.gaussian_filter(np.random.default_rng(0).random((20, 20)), 1.5) * 800
    found, turned = edges.find_edges(plane, 20, 60), edges.find_edges(np.rot90(plane, turns), 20, 60)
    assert 0.05 < found.mean() < 0.5
    assert (np.rot90(found, turns) == turned).mean() > 0.99
