"""Drifts for demonstrations, stronger than the published corruptions.

Each takes one image (height, width, channels) in [0, 1] and a severity 1..5.
"""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions import filters
from lorac_deploy.corruptions.filters import Image
from lorac_deploy.corruptions.noise import gaussian_noise
from lorac_deploy.corruptions.weather import fog


def invert(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Blend with the negative; severity 5 is the negative."""
    share = severity / 5
    return (1 - share) * image + share * (1 - image)


def rotate(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Turn counter-clockwise by 18 degrees per severity about the middle; severity 5 is a quarter turn."""
    angle = np.deg2rad(18 * severity)
    height, width = image.shape[:2]
    y, x = np.indices((height, width), dtype=float)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    rows = np.cos(angle) * y + np.sin(angle) * x
    columns = np.cos(angle) * x - np.sin(angle) * y
    return filters.sample(image, rows + (height - 1) / 2, columns + (width - 1) / 2)


def darken(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Down to 70 ... 10 % of the light."""
    return image * (0.7, 0.5, 0.35, 0.2, 0.1)[severity - 1]


def low_light(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Out of focus and dark."""
    sigma = (0.02, 0.03, 0.04, 0.05, 0.06)[severity - 1] * min(image.shape[:2])
    return darken(filters.gaussian_blur(image, sigma), severity, rng)


def fog_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Fog, and a noisy sensor."""
    return gaussian_noise(fog(image, severity, rng), severity, rng)
