"""Images to corrupt."""

from __future__ import annotations

import numpy as np

from lorac_deploy.corruptions import corrupt


def scene(n: int = 4, side: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth coloured shapes with an edge: blurs, colours and noise all show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(0.5, 3, (n * channels, 3))]
    images = 0.5 + 0.3 * np.stack(waves).reshape(n, channels, side, side).transpose(0, 2, 3, 1)
    images[:, side // 4 : side // 2, side // 3 :] *= 0.4
    return np.rint(images * 255).astype(np.uint8)


def grey(level: int) -> np.ndarray:
    return np.full((1, 160, 160, 3), level, np.uint8)


def difference(images: np.ndarray, name: str, severity: int) -> float:
    return float(np.abs(corrupt(images, name, severity).astype(int) - images).mean())
