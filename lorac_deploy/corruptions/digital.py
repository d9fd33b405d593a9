"""Digital and geometric corruptions (CIFAR-10-C).

Each takes one image (height, width, channels) in [0, 1] and a severity 1..5.
"""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from lorac_deploy.corruptions import filters
from lorac_deploy.corruptions.filters import Image


def contrast(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Shrink the distance to each channel's mean."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.asarray((image - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean)


def saturate(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Scale and shift the HSV saturation; severities 1 and 2 weaken the colours, 3 to 5 strengthen them.

    Raises ValueError for an image of one channel, which has no colours.
    """
    if image.shape[2] != 3:
        raise ValueError(f"saturate needs images of 3 channels, got {image.shape[2]}")
    factor, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    value = image.max(axis=2, keepdims=True)
    chroma = value - image
    largest = chroma.max(axis=2, keepdims=True)
    old = np.divide(largest, value, out=np.zeros_like(value), where=value > 0)
    new = np.clip(old * factor + shift, 0, 1)
    # Each channel's part of the largest distance is its hue. Greys count as red, as in the published code.
    hue = np.divide(chroma, largest, out=np.broadcast_to([0.0, 1.0, 1.0], image.shape).copy(), where=largest > 0)
    return np.asarray(value * (1 - new * hue))


def jpeg_compression(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Through a JPEG file of quality 80 to 40 and back."""
    stream = io.BytesIO()
    _to_pillow(image).save(stream, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    with PIL.Image.open(stream) as decoded:
        return _from_pillow(decoded)


def pixelate(image: Image, severity: int, _rng: np.random.Generator) -> Image:
    """Down to 95 to 65 % of the size and back, by areas."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = image.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    box = PIL.Image.Resampling.BOX
    return _from_pillow(_to_pillow(image).resize(small, box).resize((width, height), box))


def elastic_transform(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A random affine map of the corners of a triangle, then random displacements, smoothed.

    Lengths are shares of the shorter side. Severity 1 has the largest affine part and no displacements.
    """
    amplitude, sigma, corner = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    side = min(image.shape[:2])
    rows, columns = np.indices(image.shape[:2]).astype(float)
    image = filters.sample(image, *_affine(rows, columns, side, corner * side, rng), mode="reflect")
    shifts = rng.uniform(-1, 1, (*image.shape[:2], 2))
    shifts = filters.gaussian_blur(shifts, sigma * side, mode="symmetric", truncate=3.0) * (amplitude * side)
    return filters.sample(image, rows + shifts[:, :, 0], columns + shifts[:, :, 1], mode="symmetric")


def _affine(rows: Image, columns: Image, side: int, reach: float, rng: np.random.Generator) -> tuple[Image, Image]:
    """Where each pixel comes from when three corners of the middle square move by up to ``reach`` pixels."""
    centre, arm = np.array(rows.shape) // 2, side // 3
    corners = centre + np.array([[arm, arm], [arm, -arm], [-arm, -arm]], dtype=float)
    moved = corners + rng.uniform(-reach, reach, corners.shape)
    homogeneous = np.column_stack([moved, np.ones(3)])
    back = np.linalg.solve(homogeneous, corners)  # (3, 2): moved corners -> corners
    source = np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ back
    return source[:, :, 0], source[:, :, 1]


def _to_pillow(image: Image) -> PIL.Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _from_pillow(picture: PIL.Image.Image) -> Image:
    pixels = np.asarray(picture, dtype=np.float64) / 255
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
