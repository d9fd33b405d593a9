"""Fleets of tiny clients: an artifact of three layers and images whose brightness tells their class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import small_artifacts

from lorac_runtime.delta import delta
from lorac_runtime.manifest import Manifest

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


def changes(manifest: Manifest, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state makes of the weights, float64: factors of equal products are equal here."""
    found = {
        t.name: np.asarray(state[t.name], np.float64) for t in manifest.trainables if not t.role.startswith("lora_")
    }
    for a in manifest.adapters:
        factors = (np.asarray(state[name], np.float64) for name in (a.lora_a, a.lora_b))
        found[a.weight] = delta(*factors, a.weight_shape, a.alpha / a.r, a.arrangement, pairs=a.pairs)
    return found


def assert_same(manifest: Manifest, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Two states make the same of the weights, but for rounding."""
    expected = changes(manifest, other)
    for name, value in changes(manifest, one).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
