"""Blurs (CIFAR-10-C).

Each takes one image (height, width, channels) in [0, 1] and a severity 1..5.
"""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions import filters
from lorac_deploy.corruptions.filters import Image


def gaussian_blur(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Blur by a Gaussian of 0.4 to 1 pixel."""
    return filters.gaussian_blur(image, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def defocus_blur(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Blur by a disk whose edge is softened."""
    radius, softening = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    return filters.correlate(image, disk(radius, softening), mode="reflect")


def motion_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A smear along a random direction, at most 45 degrees from the rows."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    return filters.motion_blur(image, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """The mean of the image and of enlargements by steps of one per cent."""
    steps = (6, 11, 16, 21, 26)[severity - 1]
    zoomed = sum((filters.zoom(image, 1 + step / 100) for step in range(steps)), np.zeros(image.shape))
    return (image + zoomed) / (steps + 1)


def glass_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Neighbouring pixels change places, between two slight blurs.

    The paper says that pixels are shuffled; its code overwrites one of each pair. Here they are swapped.
    """
    settings = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, reach, rounds = settings[severity - 1]
    order = np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    for _ in range(rounds):
        _swap_neighbours(order, reach, rng)
    blurred = filters.gaussian_blur(image, sigma).reshape(-1, image.shape[2])
    return filters.gaussian_blur(blurred[order], sigma)


def disk(radius: float, softening: float) -> Image:
    """A filled circle, summing to one, blurred by 3 x 3 samples of a Gaussian of ``softening`` pixels."""
    reach = int(radius) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    circle = (x**2 + y**2 <= radius**2).astype(float)
    row = filters.gaussian_kernel(1, softening)
    soft = filters.correlate(circle[:, :, None] / circle.sum(), np.outer(row, row))
    return soft[:, :, 0]


def _swap_neighbours(
    order: np.ndarray[tuple[int, ...], np.dtype[np.int64]], reach: int, rng: np.random.Generator
) -> None:
    """Swap each inner pixel, from the last to the first, with one up to ``reach`` above or left of it."""
    height, width = order.shape
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    shifts = rng.integers(-reach, reach, size=(len(rows), len(columns), 2)).tolist()
    cells = order.tolist()
    for y, row in zip(rows, shifts, strict=True):
        for x, (dx, dy) in zip(columns, row, strict=True):
            cells[y][x], cells[y + dy][x + dx] = cells[y + dy][x + dx], cells[y][x]
    order[:] = cells
