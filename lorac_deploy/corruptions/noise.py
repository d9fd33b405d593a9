"""Noise corruptions (CIFAR-10-C).

Each takes one image (height, width, channels) in [0, 1] and a severity 1..5.
"""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions.filters import Image


def gaussian_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Additive noise of a constant standard deviation."""
    sigma = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return image + sigma * rng.standard_normal(image.shape)


def shot_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Photon noise: each value becomes a count of events."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Salt and pepper, each channel by itself."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit = rng.random(image.shape) <= share
    salt = rng.random(image.shape) <= 0.5
    return np.where(hit, salt.astype(float), image)


def speckle_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Noise in proportion to the brightness."""
    sigma = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
    return image + image * sigma * rng.standard_normal(image.shape)
