"""Edges of a grey image and the distance to them: what spatter's drops are shaded by.

Planes here are arrays (height, width); grey levels run from 0 to 255.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.corruptions.filters import Image

Mask = npt.NDArray[np.bool_]
_NEIGHBOURS = tuple(offset for offset in itertools.product((-1, 0, 1), repeat=2) if offset != (0, 0))
_SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])  # the slope along a row


def find_edges(plane: Image, low: float, high: float) -> Mask:
    """Canny's edges: ridges of the gradient above ``high``, and what joins them along ridges above ``low``.

    Gradients are 3 x 3 Sobel sums and their size is |dx| + |dy|.

    >>> step = np.repeat([[0.0, 0.0, 200.0, 200.0]], 4, axis=0)
    >>> find_edges(step, 50, 150).sum(axis=0).tolist()
    [0, 4, 0, 0]

    Source: Canny, "A Computational Approach to Edge Detection", 1986.
    """
    dx, dy = stencil(plane, _SOBEL, "edge"), stencil(plane, _SOBEL.T, "edge")
    size = np.abs(dx) + np.abs(dy)
    ridges = _ridges(size, dx, dy)
    return _joined(ridges & (size > high), ridges & (size > low))


def distance(mask: Mask, limit: float) -> Image:
    """Distance in pixels from each pixel to the nearest True one, at most ``limit``.

    >>> distance(np.array([[True, False, False, False]]), 2.5).tolist()
    [[0.0, 1.0, 2.0, 2.5]]
    """
    reach = int(np.ceil(limit))
    squares = np.where(mask, 0.0, np.inf)
    for axis in (0, 1):
        squares = _nearest_along(squares, axis, reach)
    return np.minimum(np.sqrt(squares), limit)


def equalize(plane: Image) -> Image:
    """Grey levels (whole numbers) spread so that their cumulative histogram is a straight line from 0 to 255.

    >>> equalize(np.array([[7.0, 7.0, 8.0, 9.0]])).tolist()
    [[0.0, 0.0, 128.0, 255.0]]
    """
    levels = plane.astype(np.intp)
    counts = np.bincount(levels.ravel(), minlength=256)
    lowest = counts[np.flatnonzero(counts)[0]]
    if lowest == levels.size:
        return plane
    table = np.rint(255 * (np.cumsum(counts) - lowest) / (levels.size - lowest))
    return np.asarray(table[levels])


def stencil(plane: Image, kernel: npt.NDArray[np.int_], mode: str) -> Image:
    """Correlate with a 3 x 3 kernel; outside, the border is as `numpy.pad` makes it in ``mode`` (edge or reflect)."""
    padded = np.pad(plane, 1, mode=mode)  # type: ignore[call-overload]
    height, width = plane.shape
    total = np.zeros(plane.shape)
    for (u, v), weight in np.ndenumerate(kernel):
        total += weight * padded[u : u + height, v : v + width]
    return total


def _ridges(size: Image, dx: Image, dy: Image) -> Mask:
    """Where the gradient is no smaller than at both neighbours in its own direction (of four), nor equal to both."""
    slope = np.abs(dy) / np.maximum(np.abs(dx), 1e-12)
    tangent = np.tan(np.pi / 8)
    flat, steep = slope < tangent, slope > 1 / tangent
    rising = dx * dy >= 0
    found = np.zeros(size.shape, bool)
    for where, (down, right) in (
        (flat, (0, 1)),
        (steep, (1, 0)),
        (~flat & ~steep & rising, (1, 1)),
        (~flat & ~steep & ~rising, (1, -1)),
    ):
        found |= where & (size > _shifted(size, -down, -right)) & (size >= _shifted(size, down, right))
    return found


def _joined(strong: Mask, weak: Mask) -> Mask:
    """The True pixels of ``weak`` that are connected to ``strong`` ones through ``weak`` ones, eight ways."""
    count = -1
    while (found := int(strong.sum())) > count:
        count = found
        strong = weak & np.logical_or.reduce([strong, *(_shifted(strong, *offset) for offset in _NEIGHBOURS)])
    return strong


def _shifted(plane: npt.NDArray[Any], down: int, right: int) -> npt.NDArray[Any]:
    """The neighbour ``down`` rows below and ``right`` columns to the right of each pixel; zero outside."""
    height, width = plane.shape
    return np.pad(plane, 1)[1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _nearest_along(squares: Image, axis: int, reach: int) -> Image:
    """The smallest squared distance by way of a pixel at most ``reach`` away along an axis."""
    length = squares.shape[axis]
    line = np.moveaxis(squares, axis, 0)
    best = line.copy()
    for step in range(1, min(reach, length - 1) + 1):
        np.minimum(best[step:], line[:-step] + step**2, out=best[step:])
        np.minimum(best[:-step], line[step:] + step**2, out=best[:-step])
    return np.moveaxis(best, 0, axis)
