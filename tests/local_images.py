"""Local images as small as can be, in files of NumPy, and what loading them gives. It serves tests/runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorac_runtime.data import LocalData, load_data
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec

NAMES = ("ant", "bee", "cat")
COLOUR = InputSpec("input", (3, 4, 5), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputSpec("input", (1, 4, 5), 1 / 255, (0.5,), (0.2,))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "local.npz", **arrays)  # type: ignore[arg-type]
    return folder / "local.npz"


def load(path: Path, spec: InputSpec = COLOUR, *, require_classes: int = 2) -> LocalData:
    return load_data(path, spec, len(NAMES), NAMES, require_classes=require_classes)


def refusal(path: Path, spec: InputSpec = COLOUR) -> str:
    with pytest.raises(DataError) as caught:
        load(path, spec)
    return str(caught.value)
