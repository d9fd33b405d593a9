"""Fleets of tiny clients: an artifact of three layers and images whose brightness tells their class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import small_artifacts

SIZE = small_artifacts.SPEC.shape[1]


def write_images(path: Path, count: int, seed: int) -> None:
    """``count`` images of four classes, a step of brightness each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = rng.integers(0, 60, (count, SIZE, SIZE, 3)) + 50 * labels[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels)


def write_clients(folder: Path, count: int, *, images: int = 12) -> Path:
    """A sub-folder for each client, with images to train on and others to test on."""
    for number in range(count):
        home = folder / f"cam{number}"
        home.mkdir(parents=True)
        write_images(home / "local.npz", images, number)
        write_images(home / "test.npz", 8, 100 + number)
    return folder


def export(out: Path, **fields: object) -> Path:
    """The artifact."""
    small_artifacts.export(out, tflite="none", **fields)
    return out
