"""`corrupt`: one entry for all corruptions, by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.corruptions import blur, digital, drift, frost, noise, spatter, weather
from lorac_deploy.corruptions.filters import Image

Corruption = Callable[[Image, int, np.random.Generator], Image]

# In the published order: the 15 that are averaged as CIFAR-10-C, then its four extra ones.
_PUBLISHED: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": frost.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": digital.saturate,
}
_DRIFTS: dict[str, Corruption] = {
    "invert": drift.invert,
    "rotate": drift.rotate,
    "darken": drift.darken,
    "low_light": drift.low_light,
    "fog_noise": drift.fog_noise,
}
_ALL = _PUBLISHED | _DRIFTS
CIFAR_C: tuple[str, ...] = tuple(_PUBLISHED)
DRIFTS: tuple[str, ...] = tuple(_DRIFTS)


def list_corruptions() -> tuple[str, ...]:
    """All names that `corrupt` knows: the published corruptions, then the drifts.

    >>> list_corruptions()[:2], list_corruptions()[-1]
    (('gaussian_noise', 'shot_noise'), 'fog_noise')
    """
    return tuple(_ALL)


def corrupt(images: npt.NDArray[Any], name: str, severity: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A corrupted copy of ``images``, uint8 (n, height, width, 1 or 3).

    Severities run from 1 to 5. The constants are those of CIFAR-10-C: lengths in pixels of 32 x 32 images,
    used as they are at other sizes. Random draws depend on ``seed`` and on the image itself, so an image is
    corrupted in the same way in any order and any subset (and equal images get equal noise).

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions", 2019.

    >>> images = np.full((2, 8, 8, 3), 100, np.uint8)
    >>> corrupt(images, "contrast", 5).max(), corrupt(images, "darken", 2).max()
    (np.uint8(100), np.uint8(50))

    Raises ValueError for an unknown name, another severity or another shape; TypeError for another dtype.
    """
    _check(images, name, severity)
    out = np.empty(images.shape, np.uint8)
    for index, image in enumerate(images):
        rng = np.random.default_rng([seed, zlib.crc32(image.tobytes())])
        result = _ALL[name](image / 255, severity, rng)
        # Truncated, not rounded, as published; the addition keeps what is whole but for rounding errors.
        out[index] = np.clip(result * 255 + 1e-6, 0, 255)
    return out


def _check(images: npt.NDArray[Any], name: str, severity: int) -> None:
    if name not in _ALL:
        raise ValueError(f"no corruption {name!r}; there are {', '.join(_ALL)}")
    if not isinstance(severity, int | np.integer) or not 1 <= severity <= 5:
        raise ValueError(f"severity must be a whole number from 1 to 5, got {severity!r}")
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(f"images must have the shape (n, height, width, 1 or 3), got {images.shape}")
