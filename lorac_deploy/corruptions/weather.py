"""Weather (CIFAR-10-C).

Each takes one image (height, width, channels) in [0, 1] and a severity 1..5.
"""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions import filters
from lorac_deploy.corruptions.filters import Image

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def fog(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A cloud of plasma laid over the image, then dimmed to the old maximum."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    height, width = image.shape[:2]
    cloud = plasma(max(height, width), decay, rng)[:height, :width, None]
    brightest = image.max()
    return np.asarray((image + amount * cloud) * (brightest / (brightest + amount)))


def snow(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Flakes: noise, enlarged, cut at a threshold, smeared downwards, over a whitened image."""
    mean, spread, factor, threshold, radius, sigma, keep = (
        (0.10, 0.2, 1.00, 0.60, 8, 3.0, 0.95),
        (0.10, 0.2, 1.00, 0.50, 10, 4.0, 0.90),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.90),
        (0.25, 0.3, 2.25, 0.60, 12, 6.0, 0.85),
        (0.30, 0.3, 1.25, 0.65, 14, 12.0, 0.80),
    )[severity - 1]
    flakes = filters.zoom(rng.normal(mean, spread, (*image.shape[:2], 1)), factor)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = filters.motion_blur(flakes, radius, sigma, rng.uniform(-135, -45))
    white = np.maximum(image, grey(image) * 1.5 + 0.5)
    return np.asarray(keep * image + (1 - keep) * white + flakes + np.rot90(flakes, 2))


def brightness(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Raise the largest of the channels; hue and saturation stay."""
    value = image.max(axis=2, keepdims=True)
    raised = np.clip(value + (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1], 0, 1)
    ratio = np.divide(raised, value, out=np.zeros_like(value), where=value > 0)
    return np.asarray(np.where(value > 0, image * ratio, raised))


def grey(image: Image) -> Image:
    """Brightness (height, width, 1) of an image of one or three channels."""
    if image.shape[2] == 1:
        return image
    return np.asarray((image * LUMA).sum(axis=2, keepdims=True))


def plasma(size: int, decay: float, rng: np.random.Generator) -> Image:
    """Diamond-square height map in [0, 1], periodic; sides are the next power of two at or above ``size``.

    >>> plasma(5, 2.0, np.random.default_rng(0)).shape
    (8, 8)
    """
    side = max(2, 1 << (size - 1).bit_length())
    field = np.zeros((side, side))
    step, swing = side, 100.0
    while step >= 2:
        refine(field, step, swing, rng)
        step, swing = step // 2, swing / decay
    return np.asarray((field - field.min()) / np.ptp(field))


def refine(field: Image, step: int, swing: float, rng: np.random.Generator) -> None:
    """One level, in place: the middles of squares of ``step``, then those of their sides, each a mean + noise."""
    half = step // 2
    corners = field[::step, ::step]
    pairs = corners + np.roll(corners, -1, axis=0)
    middles = (pairs + np.roll(pairs, -1, axis=1)) / 4
    field[half::step, half::step] = middles + _noise(swing, middles.shape, rng)
    middles = field[half::step, half::step]
    above = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
    left = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
    field[::step, half::step] = above / 4 + _noise(swing, above.shape, rng)
    field[half::step, ::step] = left / 4 + _noise(swing, left.shape, rng)


def _noise(swing: float, shape: tuple[int, ...], rng: np.random.Generator) -> Image:
    """Uniform noise; the published amplitude is the square of the swing."""
    return rng.uniform(-(swing**2), swing**2, shape)
