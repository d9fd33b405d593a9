"""Helpers for tests of the engine on tiny artifacts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from artifacts import Tiny, build
from tiny_network import CLASSES, Arrays, C, H, Recipe, W

from lorac_runtime.engines import Engine, open_engine

Make = Callable[..., Tiny]


SMOOTH, RELU = 1e-5, 1e-4  # relative, per tensor; a ReLU near zero may switch between two float32 routes


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by recipe, each built once."""
    built: dict[Recipe, Tiny] = {}

    def get(**recipe: object) -> Tiny:
        key = Recipe(**recipe)
        if key not in built:
            built[key] = build(tmp_path_factory.mktemp("artifact") / "a", key)
        return built[key]

    return get


def engine_of(tiny: Tiny) -> Engine:
    return open_engine(tiny.folder, tiny.manifest, threads=1)


def batch(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size)
    return (rng.standard_normal((size, C, H, W)) + labels[:, None, None, None]).astype(np.float32), labels


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def worst(found: Arrays, expected: Arrays) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max((distance(found[k], expected[k]), k) for k in expected)


def reference_values(tiny: Tiny) -> tuple[Arrays, str]:
    """The numbers that the training graph holds, and how PyTorch must treat BN."""
    return (tiny.unfolded, "train") if tiny.manifest.bn_policy == "batch" else (tiny.folded, "folded")
