"""Local data once they are read: preprocessing, the fingerprint, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_images import COLOUR, pixels

from lorac_runtime.data import LocalData, fingerprint, preprocess, split, stratified_split
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec


def test_preprocessing_is_scale_mean_and_std_per_channel() -> None:
    images = pixels(6, 4, 5, 3)
    found = preprocess(images, COLOUR)
    assert found.shape == (6, 3, 4, 5)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
        expected = (images[..., channel].astype(float) / 255 - mean) / std
        np.testing.assert_allclose(found[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_normalises_by_itself_takes_raw_images() -> None:
    images = pixels(2, 4, 5, 3)
    spec = InputSpec("input", (3, 4, 5), 1 / 255, (0.5,) * 3, (0.5,) * 3, in_graph=True)
    assert preprocess(images, spec) is images


def test_the_fingerprint_sees_images_labels_and_shape() -> None:
    data = LocalData(pixels(2, 4, 5, 3), np.array([0, 1]))
    other = data.images.copy()
    other[1, 2, 3, 0] ^= 1
    copies = [LocalData(data.images.copy(), data.labels.copy()), LocalData(np.asfortranarray(data.images), data.labels)]
    differ = [
        LocalData(other, data.labels),
        LocalData(data.images, np.array([0, 2])),
        LocalData(data.images.reshape(2, 5, 4, 3), data.labels),
    ]
    assert {fingerprint(copy) for copy in copies} == {fingerprint(data)}
    assert len({fingerprint(data), *map(fingerprint, differ)}) == 4
    assert len(fingerprint(data)) == 64


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0, 0.95),
    seed=st.integers(0, 5),
)
def test_a_split_is_complete_stratified_and_keeps_every_class_in_training(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    try:
        train, held = stratified_split(labels, fraction, seed)
    except DataError:
        assert int(len(labels) * fraction + 0.5) == 0 or max(sizes) == 1
        return
    assert sorted([*train, *held]) == list(range(len(labels)))
    np.testing.assert_array_equal(train, np.sort(train))
    np.testing.assert_array_equal(held, np.sort(held))
    assert train.dtype == held.dtype == np.int64
    counts = np.bincount(labels[held], minlength=len(sizes))
    for size, count in zip(sizes, counts, strict=True):
        assert count <= size - 1
        assert abs(count - min(size * fraction, size - 1)) < 1
    if all(size * fraction <= size - 1 for size in sizes):
        assert len(held) == int(len(labels) * fraction + 0.5)


def test_a_split_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(4), 10)
    first, again, other = (stratified_split(labels, 0.3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_nothing_is_held_out_at_fraction_zero() -> None:
    train, held = stratified_split(np.array([0, 1, 1]), 0.0, 0)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        stratified_split(np.array([0, 1]), fraction, 0)


@pytest.mark.parametrize(
    ("labels", "fraction", "needed"), [([0, 0], 0.2, 3), ([0, 1, 2, 3], 0.5, 2), ([0, 0, 1, 1], 0.01, 50), ([], 0.2, 3)]
)
def test_data_too_small_to_hold_anything_out_are_refused(labels: Sequence[int], fraction: float, needed: int) -> None:
    with pytest.raises(DataError, match=f"at least {needed} samples, two of them of the same class"):
        stratified_split(np.array(labels, np.int64), fraction, 0)
    enough = np.zeros(needed, np.int64)
    assert len(stratified_split(enough, fraction, 0)[1]) == 1


def test_a_fingerprint_tells_images_with_labels_from_those_without() -> None:
    images = pixels(2, 4, 5, 3)
    found = {fingerprint(LocalData(images, labels)) for labels in (None, np.array([0, 0]), np.array([0, 1]))}
    assert len(found) == 3


def test_without_labels_the_split_is_random_and_repeatable() -> None:
    data = LocalData(np.zeros((20, 1, 1, 1), np.uint8), None)
    train, held = split(data, 0.25, 1)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train, *held]) == list(range(20))
    np.testing.assert_array_equal(split(data, 0.25, 1)[1], held)
    assert not np.array_equal(split(data, 0.25, 2)[1], held)
    assert [len(part) for part in split(data, 0.0, 1)] == [20, 0]
    labelled = LocalData(data.images, np.arange(20) % 2)
    np.testing.assert_array_equal(split(labelled, 0.25, 1)[1], stratified_split(np.arange(20) % 2, 0.25, 1)[1])
