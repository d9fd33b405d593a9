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
    """The mean of the image and of enlargements by steps of one per cent.

    The published ranges end before 6, 11, 16, 21 and 26 per cent, but the first two, rounded up, include their ends.
    """
    steps = (7, 12, 16, 21, 26)[severity - 1]
    zoomed = sum((filters.zoom(image, 1 + step / 100) for step in range(steps)), np.zeros(image.shape))
    return (image + zoomed) / (steps + 1)


def glass_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Every inner pixel takes the place of a neighbour above or left of it, between two slight blurs.

    The paper speaks of swapped pixels; its code copies, and the published constants were chosen with that.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    blurred = filters.gaussian_blur(image, sigma)
    for _ in range(rounds):
        source = np.indices(image.shape[:2])
        source[:, 2:, 2:] += rng.integers(-1, 1, source[:, 2:, 2:].shape)
        blurred = blurred[source[0], source[1]]
    return filters.gaussian_blur(blurred, sigma)


def disk(radius: float, softening: float) -> Image:
    """A filled circle, summing to one, blurred by 3 x 3 samples of a Gaussian of ``softening`` pixels."""
    reach = int(radius) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    circle = (x**2 + y**2 <= radius**2).astype(float)
    row = filters.gaussian_kernel(1, softening)
    soft = filters.correlate(circle[:, :, None] / circle.sum(), np.outer(row, row))
    return soft[:, :, 0]
