"""Batches: every image once, the same order for the same seed and epoch, augmentation within its limits."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_cases import dataset, spec

from lorac_deploy.batches import augmented, batch_count, ordered_batches, training_batches
from lorac_deploy.data import Dataset
from lorac_runtime.manifest import InputSpec

RAW = InputSpec("input", (1, 1, 1), 1.0, (0.0,), (1.0,))


def numbered(n: int) -> Dataset:
    """Image number i has the pixel i and the label i."""
    values = np.arange(n)
    return Dataset(values.astype(np.uint8).reshape(n, 1, 1, 1), values, tuple(str(i) for i in range(n)))


def epoch(data: Dataset, batch_size: int = 4, *, seed: int = 0, number: int = 1) -> list[list[int]]:
    batches = training_batches(data, RAW, batch_size=batch_size, augment="none", seed=seed, epoch=number)
    return [labels.tolist() for _, labels in batches]


@given(st.integers(1, 200), st.integers(1, 70))
def test_every_image_comes_once_in_batches_of_nearly_equal_size(n: int, batch_size: int) -> None:
    batches = epoch(numbered(n), batch_size)
    sizes = [len(batch) for batch in batches]
    assert sorted(functools.reduce(operator.iadd, batches, [])) == list(range(n))
    assert len(batches) == batch_count(n, batch_size) == -(-n // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_images_and_labels_stay_together() -> None:
    data = numbered(50)
    for images, labels in training_batches(data, RAW, batch_size=7, augment="crop-flip", seed=3, epoch=2):
        assert images.flatten().tolist() == labels.tolist()


def test_order_follows_from_seed_and_epoch() -> None:
    data = numbered(40)
    assert epoch(data) == epoch(data)
    assert epoch(data) != epoch(data, number=2)
    assert epoch(data) != epoch(data, seed=1)
    assert functools.reduce(operator.iadd, epoch(data), []) != list(range(40))


def test_evaluation_takes_images_in_order_and_normalised() -> None:
    data = dataset(10)
    batches = list(ordered_batches(data, spec(data), 4))
    found = torch.cat([images for images, _ in batches])
    s = spec(data)
    expected = (data.images * s.scale - np.array(s.mean)) / np.array(s.std)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-5)
    assert torch.cat([labels for _, labels in batches]).tolist() == data.labels.tolist()


def test_without_augmentation_images_are_untouched() -> None:
    images = dataset(4).images
    assert augmented(images, "none", np.random.default_rng(0)) is images


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_augmented_images_are_shifted_and_perhaps_mirrored_copies(augment: str) -> None:
    images = dataset(60, side=16).images
    before, found = images.copy(), augmented(images, augment, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)
    seen = set()
    for image, moved in zip(images, found, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        options = {
            (y, x, mirror): padded[y : y + 16, x : x + 16][:, :: -1 if mirror else 1]
            for y in range(5)
            for x in range(5)
            for mirror in (False, True)
        }
        (match,) = [key for key, option in options.items() if np.array_equal(option, moved)]
        seen.add(match)
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(5))
    assert {mirror for _, _, mirror in seen} == ({False, True} if augment == "crop-flip" else {False})
