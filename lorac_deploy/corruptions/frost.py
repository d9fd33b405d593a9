"""Frost (CIFAR-10-C): ice grown over the lens, here from drawn crystals instead of photographs."""

from __future__ import annotations

import functools

import numpy as np

from lorac_deploy.corruptions import filters
from lorac_deploy.corruptions.filters import Image
from lorac_deploy.corruptions.weather import grey, plasma

PANES = 5  # as many as the published set has photographs
SIDE = 256  # pixels; a pane continues at its own opposite border
_CRYSTALS = 300
_FINEST = 1.5  # pixels; shorter needles are not drawn


def frost(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A random crop of a frosted pane, added to the dimmed image, by the published shares.

    The published corruption mixes in crops of five photographs. The panes here are textures of our own (`pane`), so
    only the shares are those of CIFAR-10-C, and accuracies under the two are alike, not equal.
    """
    kept, added = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    texture = pane(int(rng.integers(PANES)))
    top, left = rng.integers(0, SIDE, 2)
    rows, columns = (np.arange(length) + start for length, start in zip(image.shape[:2], (top, left), strict=True))
    ice = texture[np.ix_(rows % SIDE, columns % SIDE)]
    return np.asarray(kept * image + added * (ice if image.shape[2] == 3 else grey(ice)))


@functools.cache
def pane(number: int) -> Image:
    """A frosted pane (SIDE, SIDE, 3) in [0, 1], read-only: fern-like crystals in a haze of uneven thickness.

    >>> pane(0).shape
    (256, 256, 3)
    """
    rng = np.random.default_rng([number, SIDE])
    haze = plasma(SIDE, 2.0, rng)
    ice = _smooth(_drawn(*_crystals(rng)), 0.6)
    thickness = ice / np.quantile(ice, 0.9) * (0.6 + 2 * haze) + 0.2 * haze
    light = 1 - np.exp(-2.5 * thickness)
    blue = np.array([0.80, 0.92, 1.0])  # thin ice looks blue, thick ice white
    result = light[:, :, None] * (blue + (1 - blue) * light[:, :, None])
    result.flags.writeable = False
    return np.asarray(result)


def _crystals(rng: np.random.Generator) -> tuple[Image, Image]:
    """Needles of all crystals: starts (n, 2) and directed lengths (n, 2), in pixels.

    A crystal is a fan of stems. Twice, needles grow from both sides of the last ones, 60 degrees off, the shorter
    the nearer to the tip, as in dendrites of ice.
    """
    stems = rng.integers(2, 6, _CRYSTALS)
    starts = np.repeat(rng.uniform(0, SIDE, (_CRYSTALS, 2)), stems, axis=0)
    angles = np.repeat(rng.uniform(0, 2 * np.pi, _CRYSTALS), stems) + rng.normal(0, 0.9, len(starts))
    lengths = rng.uniform(8, 30, len(starts))
    needles = [(starts, _directed(angles, lengths))]
    for spacing, share in ((4.0, 0.55), (3.0, 0.4)):
        starts, angles, lengths = _branches(starts, angles, lengths, spacing=spacing, share=share, rng=rng)
        needles.append((starts, _directed(angles, lengths)))
    return np.concatenate([start for start, _ in needles]), np.concatenate([reach for _, reach in needles])


def _branches(
    starts: Image, angles: Image, lengths: Image, *, spacing: float, share: float, rng: np.random.Generator
) -> tuple[Image, Image, Image]:
    """Needles on both sides of others, ``spacing`` pixels apart, as long as ``share`` of what is left to the tip."""
    count = (lengths / spacing).astype(int)
    parent = np.repeat(np.arange(len(starts)), 2 * count)
    place = np.concatenate([np.repeat(np.arange(n) * spacing, 2) for n in count] or [np.zeros(0)])
    side = np.where(np.arange(len(parent)) % 2 == 0, 1.0, -1.0)
    length = share * (lengths[parent] - place) * rng.uniform(0.6, 1.2, len(parent))
    start = starts[parent] + _directed(angles[parent], place)
    angle = angles[parent] + side * np.pi / 3 + rng.normal(0, 0.05, len(parent))
    drawn = length > _FINEST
    return start[drawn], angle[drawn], length[drawn]


def _directed(angles: Image, lengths: Image) -> Image:
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1) * lengths[:, None]


def _drawn(starts: Image, reaches: Image) -> Image:
    """How often needles pass each pixel, half a pixel being a pass, thinner towards the tips."""
    plane = np.zeros((SIDE, SIDE))
    steps = np.ceil(2 * np.hypot(*reaches.T)).astype(int)
    needle = np.repeat(np.arange(len(steps)), steps)
    along = np.concatenate([np.arange(n) / n for n in steps])
    points = np.floor(starts[needle] + along[:, None] * reaches[needle]).astype(int) % SIDE
    np.add.at(plane, (points[:, 0], points[:, 1]), 1 - 0.7 * along)
    return plane


def _smooth(plane: Image, sigma: float) -> Image:
    """Gaussian blur of a pane, around its borders."""
    reach = 4
    padded = np.pad(plane, reach, mode="wrap")[:, :, None]
    return filters.gaussian_blur(padded, sigma)[reach:-reach, reach:-reach, 0]
