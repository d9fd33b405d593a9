"""Blurs, bilinear sampling and zooming of single images, in numpy.

Images here are float arrays (height, width, channels); lengths are in pixels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float64]
PadMode = Literal["edge", "reflect", "symmetric"]


def correlate(image: Image, kernel: Image, *, mode: PadMode = "edge") -> Image:
    """Correlate every channel with an odd-sided kernel (height, width); the size stays.

    >>> correlate(np.ones((2, 2, 1)), np.full((3, 3), 1 / 9)).round(6).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    rows, columns = kernel.shape
    padded = _pad(image, rows // 2, columns // 2, mode)
    height, width = image.shape[:2]
    result = np.zeros(image.shape)
    for u, v in np.argwhere(kernel != 0):
        result += kernel[u, v] * padded[u : u + height, v : v + width]
    return result


def gaussian_blur(image: Image, sigma: float, *, mode: PadMode = "edge", truncate: float = 4.0) -> Image:
    """Gaussian blur; the kernel reaches ``truncate * sigma`` pixels. A sigma of 0 changes nothing.

    >>> gaussian_blur(np.eye(3)[:, :, None], 0.0)[:, :, 0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if sigma == 0:
        return image.copy()
    row = gaussian_kernel(int(truncate * sigma + 0.5), sigma)[None]
    return correlate(correlate(image, row, mode=mode), row.T, mode=mode)


def gaussian_kernel(radius: int, sigma: float) -> Image:
    """(2 * radius + 1,) samples of a Gaussian, summing to one."""
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(kernel / kernel.sum())


def motion_blur(image: Image, radius: int, sigma: float, angle: float) -> Image:
    """One-sided Gaussian smear of 2 * radius + 1 taps towards ``angle`` (degrees; 0 = along a row).

    >>> line = np.zeros((1, 5, 1))
    >>> line[0, 4] = 1.0
    >>> (motion_blur(line, 1, 1.0, 0.0) > 0).ravel().tolist()          # the bright pixel spreads to one side
    [False, False, True, True, True]
    """
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    direction = np.deg2rad(angle)
    dy = np.ceil(taps * np.sin(direction) - 0.5).astype(int)
    dx = np.ceil(taps * np.cos(direction) - 0.5).astype(int)
    height, width = image.shape[:2]
    smeared = np.zeros(image.shape)
    for weight, down, right in zip(weights / weights.sum(), dy, dx, strict=True):
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        smeared += weight * image[rows[:, None], columns]
    return smeared


def sample(image: Image, rows: Image, columns: Image, *, mode: PadMode = "edge") -> Image:
    """Bilinear samples of ``image`` at fractional coordinates: the shape of ``rows`` + (channels,).

    Outside the image the border is repeated (``edge``) or mirrored, without (``reflect``) or with
    (``symmetric``) a second copy of the last pixels.

    >>> image = np.array([[[0.0], [1.0]], [[2.0], [3.0]]])
    >>> sample(image, np.array([[0.5]]), np.array([[0.5]])).item()
    1.5
    """
    height, width = image.shape[:2]
    y, x = _fold(rows, height, mode), _fold(columns, width, mode)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    fy, fx = (y - top)[..., None], (x - left)[..., None]
    upper = image[top, left] * (1 - fx) + image[top, right] * fx
    lower = image[bottom, left] * (1 - fx) + image[bottom, right] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)


def zoom(image: Image, factor: float) -> Image:
    """The middle of the image, enlarged by ``factor`` >= 1 to the same size (corner pixels stay corners).

    >>> zoom(np.arange(9.0).reshape(3, 3, 1), 1.0).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """
    y, x = (_zoom_axis(length, factor) for length in image.shape[:2])
    return sample(image, *np.meshgrid(y, x, indexing="ij"))


def _zoom_axis(length: int, factor: float) -> Image:
    """Source coordinates of one axis: crop the middle, stretch it, cut what is too much."""
    crop = int(np.ceil(length / factor))
    stretched = max(round(crop * factor), length)
    first = (stretched - length) // 2
    step = (crop - 1) / (stretched - 1) if stretched > 1 else 0.0
    return np.asarray((length - crop) // 2 + step * np.arange(first, first + length))


def _pad(image: Image, rows: int, columns: int, mode: PadMode) -> Image:
    width = ((rows, rows), (columns, columns), (0, 0))
    return np.pad(image, width, mode=mode)


def _fold(coordinate: Image, length: int, mode: PadMode) -> Image:
    """Bring coordinates into [0, length - 1]."""
    last = length - 1
    if mode == "edge" or last == 0:
        return np.clip(coordinate, 0, last)
    half = 0.5 if mode == "symmetric" else 0.0
    period = 2 * (last + 2 * half)
    offset = np.mod(coordinate + half, period)
    return np.asarray(np.clip(np.minimum(offset, period - offset) - half, 0, last))
