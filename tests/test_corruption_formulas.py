"""Corruptions: the formulas of some."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import PIL.Image
import pytest
import torch
from corruption_scenes import difference, grey, scene
from hypothesis import given
from hypothesis import strategies as st

from lorac_deploy.corruptions import corrupt
from lorac_deploy.corruptions.blur import disk
from lorac_deploy.corruptions.frost import PANES, SIDE, frost, pane
from lorac_deploy.corruptions.spatter import MUD, WATER
from lorac_deploy.corruptions.weather import plasma, refine


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_noise_has_the_published_deviation(severity: int) -> None:
    found = corrupt(grey(128), "gaussian_noise", severity) / 255
    assert found.std() == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10][severity - 1], rel=0.03)
    assert found.mean() == pytest.approx(127.5 / 255, abs=0.002)  # truncation takes half a level


@pytest.mark.parametrize("severity", range(1, 6))
def test_shot_noise_counts_photons(severity: int) -> None:
    photons = [500, 250, 100, 75, 50][severity - 1]
    found = corrupt(grey(64), "shot_noise", severity) / 255
    assert found.std() == pytest.approx(np.sqrt(64 / 255 / photons), rel=0.03)


@pytest.mark.parametrize("severity", range(1, 6))
def test_impulse_noise_is_half_salt_half_pepper(severity: int) -> None:
    found = corrupt(grey(128), "impulse_noise", severity)
    share = [0.01, 0.02, 0.03, 0.05, 0.07][severity - 1]
    assert (found == 255).mean() == pytest.approx(share / 2, rel=0.1)
    assert (found == 0).mean() == pytest.approx(share / 2, rel=0.1)
    assert set(np.unique(found)) == {0, 128, 255}


@pytest.mark.parametrize("level", [60, 180])
def test_speckle_noise_grows_with_the_brightness(level: int) -> None:
    found = corrupt(grey(level), "speckle_noise", 2) / 255
    assert found.std() == pytest.approx(0.1 * level / 255, rel=0.03)


def test_contrast_shrinks_towards_each_channels_mean() -> None:
    images = scene()
    mean = images.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_array_less(np.abs(corrupt(images, "contrast", 3) - (mean + 0.4 * (images - mean))), 1.0)


def hsv_reference(pixel: np.ndarray, *, factor: float = 1.0, shift: float = 0.0, light: float = 0.0) -> list[float]:
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    saturation = min(1.0, max(0.0, saturation * factor + shift))
    return [255 * c for c in colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + light))]


@pytest.mark.parametrize(
    ("name", "severity", "change"),
    [
        ("brightness", 1, {"light": 0.05}),
        ("brightness", 5, {"light": 0.3}),
        ("saturate", 1, {"factor": 0.3}),
        ("saturate", 2, {"factor": 0.1}),
        ("saturate", 3, {"factor": 1.5}),
        ("saturate", 5, {"factor": 2.5, "shift": 0.2}),
    ],
)
def test_colour_changes_agree_with_the_standard_librarys_hsv(name: str, severity: int, change: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    pixels[:4] = [[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 255]]
    expected = np.array([hsv_reference(pixel, **change) for pixel in pixels])
    found = corrupt(pixels.reshape(1, 20, 10, 3), name, severity).reshape(-1, 3)
    assert np.all((expected - found > -1e-3) & (expected - found < 1.0))  # truncated, not rounded


def test_brightness_of_one_channel_is_a_shift() -> None:
    images = scene(channels=1) // 2
    np.testing.assert_array_equal(corrupt(images, "brightness", 1), np.floor(images + 0.05 * 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_of_the_published_quality(channels: int) -> None:
    image = scene(1, channels=channels)[0]
    stream = io.BytesIO()
    PIL.Image.fromarray(image.squeeze()).save(stream, "JPEG", quality=58)
    expected = np.asarray(PIL.Image.open(stream)).reshape(image.shape)
    np.testing.assert_array_equal(corrupt(image[None], "jpeg_compression", 3)[0], expected)


def test_pixelate_leaves_the_mean_and_removes_detail() -> None:
    checkers = (np.indices((1, 40, 40, 3)).sum(0) % 2 * 255).astype(np.uint8)
    found = corrupt(checkers, "pixelate", 5)
    assert found.mean() == pytest.approx(127.5, abs=3)
    assert found.std() < 0.5 * checkers.std()


def test_defocus_blurs_by_a_disk() -> None:
    kernel = disk(1.5, 0.1)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel[1:4, 1:4], 1 / 9, atol=1e-6)
    image = scene(1).astype(float) / 255
    padded = torch.nn.functional.pad(torch.from_numpy(image).permute(0, 3, 1, 2), (2,) * 4, mode="reflect")
    weight = torch.from_numpy(kernel).expand(3, 1, 5, 5)
    expected = torch.nn.functional.conv2d(padded, weight, groups=3).permute(0, 2, 3, 1) * 255
    error = expected.numpy() - corrupt(scene(1), "defocus_blur", 5)
    assert error.min() > -1e-3
    assert error.max() < 1


def test_zoom_blur_leaves_a_flat_image_and_smears_the_border_most() -> None:
    np.testing.assert_array_equal(corrupt(grey(90), "zoom_blur", 5), grey(90))
    point = np.zeros((1, 33, 33, 1), np.uint8)
    point[0, 16, 16] = point[0, 2, 2] = 255
    found = corrupt(point, "zoom_blur", 5)[0, :, :, 0]
    assert found[16, 16] > 1.5 * found[2, 2] > 0


def test_glass_blur_moves_pixels_by_one_per_round() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 4, (32, 32, 3))[None]
    moved = (ramp.astype(int) - corrupt(ramp, "glass_blur", 1))[0, :, :, 0]
    assert set(np.unique(moved[2:, 2:])) == {0, 4}
    assert not moved[:2].any()
    assert not moved[:, :2].any()
    np.testing.assert_allclose((moved[2:, 2:] == 4).mean(), 0.5, atol=0.06)


@pytest.mark.parametrize("severity", range(1, 6))
def test_zoom_blur_averages_the_published_number_of_enlargements(severity: int) -> None:
    point = np.zeros((1, 101, 101, 1), np.uint8)
    point[0, 100, 100] = 255  # only in the image itself and in the first "enlargement", by nothing
    count = [7, 12, 16, 21, 26][severity - 1]
    assert corrupt(point, "zoom_blur", severity)[0, 100, 100, 0] == int(255 * 2 / (count + 1) + 1e-6)


@pytest.mark.parametrize("severity", range(1, 6))
def test_frost_mixes_by_the_published_shares(severity: int) -> None:
    kept, added = [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)][severity - 1]
    black, grey_image = np.zeros((SIDE, SIDE, 3)), np.full((SIDE, SIDE, 3), 0.4)
    ice = frost(black, severity, np.random.default_rng(0))
    np.testing.assert_allclose(frost(grey_image, severity, np.random.default_rng(0)) - ice, 0.4 * kept)
    means = [added * pane(number).mean() for number in range(PANES)]
    assert min(abs(ice.mean() - mean) for mean in means) < 1e-9


def test_frost_uses_all_panes_and_continues_them_at_their_borders() -> None:
    means = {corrupt(np.zeros((1, SIDE, SIDE, 3), np.uint8), "frost", 5, seed=seed).mean() for seed in range(30)}
    assert len(means) == PANES
    wide = frost(np.zeros((8, 2 * SIDE, 3)), 5, np.random.default_rng(0))
    np.testing.assert_array_equal(wide[:, :SIDE], wide[:, SIDE:])
    for axis in (0, 1):
        texture = pane(0)
        seam = np.abs(texture.take(0, axis) - texture.take(-1, axis)).mean()
        assert seam < 2 * np.abs(np.diff(texture, axis=axis)).mean()


@pytest.mark.parametrize("number", range(PANES))
def test_a_pane_is_bluish_white_and_rich_in_contrast_at_the_size_of_small_images(number: int) -> None:
    texture = pane(number)
    assert 0 <= texture.min() < texture.max() <= 1
    assert (np.diff(texture, axis=2) >= 0).all()  # red <= green <= blue
    assert 0.5 < texture.mean() < 0.8
    tiles = texture.mean(axis=2).reshape(8, 32, 8, 32)
    assert np.median(tiles.std(axis=(1, 3))) > 0.15


@pytest.mark.parametrize("severity", range(1, 6))
def test_spatter_lays_the_colour_of_its_liquid(severity: int) -> None:
    change = corrupt(grey(100), "spatter", severity).astype(int)[0].reshape(-1, 3) - 100
    wet = change[np.abs(change).max(axis=1) > 5]
    assert 0.005 < len(wet) / len(change) < 0.6
    expected = MUD - 100 / 255 if severity >= 4 else WATER
    np.testing.assert_allclose(
        wet / np.linalg.norm(wet, axis=1)[:, None] @ expected / np.linalg.norm(expected), 1, atol=0.03
    )


def test_spatter_on_a_grey_image_is_grey() -> None:
    black = np.zeros((1, 160, 160, 1), np.uint8)
    for severity, colour in ((1, 0.5 * WATER), (5, MUD)):
        brightest = corrupt(black, "spatter", severity).max()
        assert brightest == pytest.approx(255 * colour @ [0.299, 0.587, 0.114], abs=2)


def test_mud_hides_what_is_behind_it() -> None:
    dark, light = (corrupt(grey(level), "spatter", 4, seed=1)[0].astype(int) for level in (0, 255))
    covered = np.abs(corrupt(grey(0), "spatter", 4, seed=1)[0] / 255 - MUD).max(axis=2) < 0.01
    assert covered.mean() > 0.001
    assert dark[~covered].mean() < 20 < 230 < light.mean()


def test_elastic_transform_moves_but_keeps_the_palette() -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 8:24, 8:24] = 200
    found = corrupt(image, "elastic_transform", 5)
    assert found.max() >= 199
    assert found.mean() == pytest.approx(image.mean(), rel=0.25)
    assert difference(image, "elastic_transform", 5) > 2


def test_elastic_transforms_go_nowhere_on_average() -> None:
    ramp = np.broadcast_to((np.arange(32, dtype=np.uint8) * 8)[:, None, None], (32, 32, 3))[None]
    for images in (ramp, ramp.transpose(0, 2, 1, 3)):
        moved = [corrupt(images, "elastic_transform", 1, seed=seed).astype(int) - images for seed in range(30)]
        pixels = np.stack(moved)[:, 0, 8:24, 8:24] / 8
        assert abs(pixels.mean()) < 0.5
        assert 0.5 < np.abs(pixels).mean() < 2.6  # corners move by up to 8 % of 32 pixels


def test_fog_never_brightens_the_brightest_pixel_and_lightens_the_dark() -> None:
    images = scene()
    found = corrupt(images, "fog", 5)
    assert found.max() <= images.max()
    dark = images < 60
    assert found[dark].mean() > images[dark].mean()


@given(st.integers(2, 70), st.floats(1.5, 3.0), st.integers(0, 5))
def test_plasma_is_a_periodic_map_in_the_unit_range(size: int, decay: float, seed: int) -> None:
    cloud = plasma(size, decay, np.random.default_rng(seed))
    assert cloud.min() == 0
    assert cloud.max() == 1
    assert cloud.shape[0] >= size > cloud.shape[0] // 2


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_level_of_plasma_takes_the_means_of_four_neighbours_around_the_border(step: int) -> None:
    field = np.zeros((8, 8))
    field[::step, ::step] = np.random.default_rng(0).random((8 // step, 8 // step))
    expected, half = field.copy(), step // 2
    squares = [(y, x) for y in range(half, 8, step) for x in range(half, 8, step)]
    sides = [(y, x) for y in range(0, 8, half) for x in range(0, 8, half) if (y + x) // half % 2 == 1]
    for points, reach in ((squares, [(-half, -half), (-half, half), (half, -half), (half, half)]),
                          (sides, [(-half, 0), (half, 0), (0, -half), (0, half)])):  # fmt: skip
        for y, x in points:
            expected[y, x] = np.mean([expected[(y + dy) % 8, (x + dx) % 8] for dy, dx in reach])
    refine(field, step, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(field, expected, atol=1e-12)


def test_plasma_is_smoother_with_a_faster_decay() -> None:
    rough, smooth = (plasma(64, decay, np.random.default_rng(0)) for decay in (1.75, 3.0))
    assert np.abs(np.diff(smooth)).mean() < 0.8 * np.abs(np.diff(rough)).mean()
    wrap = np.abs(smooth[:, 0] - smooth[:, -1]).mean()
    assert wrap < 3 * np.abs(np.diff(smooth)).mean()
