"""Spatter (CIFAR-10-C): drops of water or mud on the lens."""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions import edges, filters
from lorac_deploy.corruptions.filters import Image
from lorac_deploy.corruptions.weather import grey

WATER = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
_MEAN = np.ones((3, 3), dtype=int)


def spatter(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Drops where smoothed noise exceeds a threshold: water up to severity 3, mud from 4 on.

    The published steps with our own edge detector and distances (`lorac_deploy.corruptions.edges`) in place of
    OpenCV's. On an image of one channel the liquids are grey.
    """
    mean, spread, sigma, threshold, strength, mud = (
        (0.62, 0.1, 0.7, 0.70, 0.5, False),
        (0.65, 0.1, 0.8, 0.70, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )[severity - 1]
    liquid = filters.gaussian_blur(rng.normal(mean, spread, (*image.shape[:2], 1)), sigma)[:, :, 0]
    liquid[liquid < threshold] = 0
    if mud:
        return _muddy(image, (liquid > threshold).astype(float), strength)
    return image + strength * _shading(np.floor(np.clip(liquid, 0, 1) * 255))[:, :, None] * _colour(WATER, image)


def _muddy(image: Image, drops: Image, sigma: float) -> Image:
    """Mud hides what is behind it; drops smaller than their softened border vanish."""
    cover = filters.gaussian_blur(drops[:, :, None], sigma)
    cover[cover < 0.8] = 0
    return np.asarray(image * (1 - cover) + cover * _colour(MUD, image))


def _shading(liquid: Image) -> Image:
    """Light that drops of a thickness 0 to 255 add, 0 to 1: by the distance to their rims, lit from one corner."""
    rims = edges.find_edges(liquid, 50, 150)
    depth = np.floor(_mean(edges.distance(rims, limit=20)))
    lit = np.clip(edges.stencil(edges.equalize(depth), _EMBOSS, "reflect"), 0, 255)
    light = liquid * np.rint(_mean(lit))
    return np.asarray(light / max(light.max(), 1.0))


def _mean(plane: Image) -> Image:
    return edges.stencil(plane, _MEAN, "reflect") / 9


def _colour(colour: Image, image: Image) -> Image:
    """A colour for images of as many channels as ``image`` has."""
    return colour if image.shape[2] == 3 else grey(colour[None, None])[0, 0]
