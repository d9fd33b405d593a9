"""Corruptions: what all of them promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from corruption_scenes import difference, scene
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_deploy.corruptions import CIFAR_C, DRIFTS, corrupt, list_corruptions

ALL = list_corruptions()
RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog",
    "frost", "spatter", "elastic_transform", "fog_noise",
}  # fmt: skip
# The published constants of these do not grow from one severity to the next; an angle is no distance.
UNORDERED = {"glass_blur", "saturate", "elastic_transform", "frost", "spatter", "rotate"}


def test_all_nineteen_are_there_in_the_published_order() -> None:
    assert len(CIFAR_C) == len(set(CIFAR_C)) == 19
    assert CIFAR_C[7:10] == ("snow", "frost", "fog")
    assert CIFAR_C[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert CIFAR_C + DRIFTS == ALL


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 8, 3), (1, 33, 20, 3), (1, 224, 224, 3)])
def test_every_corruption_keeps_shape_and_input_and_changes_pixels(name: str, shape: tuple[int, ...]) -> None:
    images = scene(shape[0], max(shape[1:3]), shape[3])[:, : shape[1], : shape[2]].copy()
    if name == "saturate" and shape[3] == 1:
        with pytest.raises(ValueError, match="needs images of 3 channels, got 1"):
            corrupt(images, name, 4)
        return
    before = images.copy()
    result = corrupt(images, name, 4)
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    np.testing.assert_array_equal(images, before)
    assert not np.array_equal(result, images)


@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0, 128, 255]))
@settings(max_examples=150)
def test_odd_sizes_and_flat_images_are_no_obstacle(
    name: str, severity: int, height: int, width: int, level: int
) -> None:
    images = np.full((1, height, width, 3), level, np.uint8)
    assert corrupt(images, name, severity).shape == images.shape


@pytest.mark.parametrize("name", sorted(set(ALL) - UNORDERED))
def test_a_higher_severity_changes_more(name: str) -> None:
    differences = [difference(scene(8), name, severity) for severity in range(1, 6)]
    assert all(b > a - 0.1 for a, b in itertools.pairwise(differences)), differences
    assert differences[4] > 1.2 * differences[0]


@pytest.mark.parametrize("name", sorted(UNORDERED))
def test_every_severity_of_the_others_differs(name: str) -> None:
    results = [corrupt(scene(2), name, severity).tobytes() for severity in range(1, 6)]
    assert len(set(results)) == 5


@pytest.mark.parametrize("name", ALL)
def test_the_seed_changes_what_is_random_and_nothing_else(name: str) -> None:
    images = scene(2)
    first, again, other = (corrupt(images, name, 3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (name not in RANDOM)


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_corrupted_alike_in_any_order_and_subset(name: str) -> None:
    images, order = scene(4), [2, 0, 3]
    np.testing.assert_array_equal(corrupt(images[order], name, 3), corrupt(images, name, 3)[order])


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_different_images_get_different_draws(name: str) -> None:
    images = scene(1).repeat(2, axis=0)
    images[1, 0, 0, 0] ^= 1  # as good as equal, so the results differ by the draws only
    first, second = corrupt(images, name, 5).astype(int)
    assert (np.abs(first - second) > 1).mean() > 0.05


def test_drifts_at_full_strength_are_what_their_names_say() -> None:
    images = scene()
    np.testing.assert_array_equal(corrupt(images, "invert", 5), 255 - images)
    np.testing.assert_array_equal(corrupt(images, "rotate", 5), np.rot90(images, 1, axes=(1, 2)))
    np.testing.assert_array_equal(corrupt(images, "darken", 2), images // 2)
    assert corrupt(images, "low_light", 5).max() <= 26
    assert set(DRIFTS) == {"invert", "rotate", "darken", "low_light", "fog_noise"}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": "rain"}, ValueError, "no corruption 'rain'; there are gaussian_noise"),
        ({"severity": 0}, ValueError, "from 1 to 5, got 0"),
        ({"severity": 6}, ValueError, "from 1 to 5, got 6"),
        ({"severity": 2.0}, ValueError, "from 1 to 5, got 2.0"),
        ({"images": np.zeros((1, 8, 8, 3), np.float32)}, TypeError, "uint8, got float32"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, ValueError, r"got \(8, 8, 3\)"),
        ({"images": np.zeros((1, 3, 8, 8), np.uint8)}, ValueError, r"got \(1, 3, 8, 8\)"),
        ({"images": np.zeros((1, 0, 8, 3), np.uint8)}, ValueError, r"got \(1, 0, 8, 3\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], text: str) -> None:
    given = {"images": scene(1), "name": "fog", "severity": 1} | change
    with pytest.raises(error, match=text):
        corrupt(given["images"], given["name"], given["severity"])


def test_no_images_give_no_images() -> None:
    assert corrupt(np.zeros((0, 8, 8, 3), np.uint8), "fog", 1).shape == (0, 8, 8, 3)
