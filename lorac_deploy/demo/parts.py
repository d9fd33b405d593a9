"""The demo's three sets of digits, none of which shares an image with another, and the drift.

scikit-learn ships 1,797 handwritten digits. 1,000 train the base; 300 others, drifted, are what the device
collects; the rest is trained on by neither and measures both, clean and drifted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import Dataset, load_dataset


@dataclasses.dataclass(frozen=True)
class PartsConfig:
    """How many digits train the base and how many the device, and what happens to the camera."""

    base_images: int = 1000
    local_images: int = 300
    drift: str = "low_light"
    severity: int = 4
    seed: int = 0


def write_parts(folder: Path, config: PartsConfig) -> dict[str, int]:
    """Write base.npz, local.npz, test_clean.npz and test_drifted.npz; returns how many images the sets hold."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = _all_digits()
    order = stratified_order(digits.labels, config.seed)
    stops = (config.base_images, config.base_images + config.local_images)
    base, local, test = (digits.select(part) for part in np.split(order, stops))
    for name, part in (("base", base), ("test_clean", test)):
        _save(folder / f"{name}.npz", part.images, part.labels)
    for name, part in (("local", local), ("test_drifted", test)):
        drifted = corrupt(part.images, config.drift, config.severity, seed=config.seed)
        _save(folder / f"{name}.npz", drifted, part.labels)
    return {"base": len(base), "local": len(local), "test": len(test)}


def stratified_order(labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.intp]:
    """A random order of the samples in which every stretch holds the classes in nearly their overall shares.

    >>> np.array([0, 0, 0, 1, 1, 1])[stratified_order(np.array([0, 0, 0, 1, 1, 1]), 0)].tolist()
    [0, 1, 0, 1, 0, 1]
    """
    generator = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[members] = (generator.permutation(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")


def _all_digits() -> Dataset:
    parts = [load_dataset("digits", split="train"), load_dataset("digits", split="test")]
    images, labels = (np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "labels"))
    return Dataset(images, labels, parts[0].class_names)


def _save(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    np.savez_compressed(path, images=images, labels=labels)
