"""Filters against PyTorch's own convolution, sampling and resizing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorac_deploy.corruptions import filters

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]))


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


@given(SIZES, st.integers(0, 9))
def test_correlation_is_pytorch_convolution_of_a_padded_image(shape: tuple[int, int, int], seed: int) -> None:
    image, kernel = picture(shape, seed), picture((3, 5), seed + 1)
    padded = torch.nn.functional.pad(nchw(image), (2, 2, 1, 1), mode="replicate")
    weight = torch.from_numpy(kernel).expand(shape[2], 1, 3, 5)
    expected = torch.nn.functional.conv2d(padded, weight, groups=shape[2])
    np.testing.assert_allclose(nchw(filters.correlate(image, kernel)), expected, atol=1e-12)


@pytest.mark.parametrize(("mode", "padding"), [("edge", "border"), ("reflect", "reflection")])
@given(shape=st.tuples(st.integers(2, 12), st.integers(2, 12), st.just(3)), seed=st.integers(0, 9))
def test_sampling_is_pytorch_grid_sample(mode: str, padding: str, shape: tuple[int, int, int], seed: int) -> None:
    height, width, _ = shape
    image, rng = picture(shape, seed), np.random.default_rng(seed)
    rows, columns = rng.uniform(-height, 2 * height, (4, 5)), rng.uniform(-width, 2 * width, (4, 5))
    grid = np.stack([columns * 2 / (width - 1), rows * 2 / (height - 1)], -1) - 1
    expected = torch.nn.functional.grid_sample(
        nchw(image), torch.from_numpy(grid)[None], mode="bilinear", padding_mode=padding, align_corners=True
    )
    np.testing.assert_allclose(nchw(filters.sample(image, rows, columns, mode=mode)), expected, atol=1e-9)


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric"])
def test_sampling_outside_continues_as_numpy_pads(mode: str) -> None:
    image = picture((4, 5, 3))
    rows, columns = np.meshgrid(np.arange(-3, 7), np.arange(-3, 8), indexing="ij")
    found = filters.sample(image, rows.astype(float), columns.astype(float), mode=mode)
    np.testing.assert_allclose(found, np.pad(image, ((3, 3), (3, 3), (0, 0)), mode=mode), atol=1e-12)


def test_an_image_of_one_pixel_is_that_pixel_everywhere() -> None:
    image = picture((1, 1, 3))
    found = filters.sample(image, np.array([[-2.0, 0.4]]), np.array([[3.0, 0.1]]), mode="reflect")
    np.testing.assert_allclose(found, np.broadcast_to(image, (1, 2, 3)), atol=1e-15)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.1, 1.25, 2.25])
@pytest.mark.parametrize("side", [8, 31, 32])
def test_zoom_is_the_middle_of_pytorch_bilinear_enlargement(factor: float, side: int) -> None:
    image = picture((side, side, 3))
    crop = int(np.ceil(side / factor))
    large = max(round(crop * factor), side)
    top, cut = (side - crop) // 2, (large - side) // 2
    middle = nchw(image[top : top + crop, top : top + crop])
    stretched = torch.nn.functional.interpolate(middle, size=(large, large), mode="bilinear", align_corners=True)
    expected = stretched[:, :, cut : cut + side, cut : cut + side]
    np.testing.assert_allclose(nchw(filters.zoom(image, factor)), expected, atol=1e-9)


@given(st.floats(0.05, 4.0), SIZES)
def test_gaussian_blur_keeps_a_flat_image(sigma: float, shape: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(filters.gaussian_blur(np.full(shape, 0.3), sigma), 0.3, atol=1e-12)


def test_gaussian_blur_of_a_point_is_the_gaussian() -> None:
    image = np.zeros((33, 33, 1))
    image[16, 16] = 1.0
    y, x = np.mgrid[-16:17, -16:17]
    expected = np.exp(-(x**2 + y**2) / (2 * 1.5**2)) / (2 * np.pi * 1.5**2)
    np.testing.assert_allclose(filters.gaussian_blur(image, 1.5)[:, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize(("angle", "step"), [(0, (0, 1)), (90, (1, 0)), (-90, (-1, 0)), (45, (1, 1)), (-45, (-1, 1))])
def test_motion_blur_reads_pixels_along_its_angle(angle: float, step: tuple[int, int]) -> None:
    image = picture((15, 15, 3))
    found = filters.motion_blur(image, 1, 1.5, angle)[7, 7]
    # On the diagonals the second and third tap stand at 0.7 and 1.4 pixels: both are rounded to 1.
    reach = [0, 1, 1] if angle in (45, -45) else [0, 1, 2]
    weights = np.exp(-0.5 * (np.arange(3) / 1.5) ** 2)
    pixels = [image[7 + step[0] * r, 7 + step[1] * r] for r in reach]
    np.testing.assert_allclose(found, np.average(pixels, axis=0, weights=weights), atol=1e-12)


def test_motion_blur_spreads_by_its_sigma() -> None:
    image = np.zeros((1, 41, 1))
    image[0, 20] = 1.0
    narrow, wide = (filters.motion_blur(image, 8, sigma, 0.0)[0, :20, 0].sum() for sigma in (1.0, 4.0))
    assert 0 < narrow < wide < 1
