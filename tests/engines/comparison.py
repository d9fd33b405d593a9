"""Two runs of one artifact: how far are their losses and what they trained from each other?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER, load
from lorac_runtime.patch import batchnorm_tensors

LOSS, CHANGE = 1e-4, 1e-3  # relative: each step's loss; each tensor's change, by its norm
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left: a loss per step, tensors less those of the artifact, versions, the median step's seconds."""

    losses: tuple[float, ...]
    changes: Arrays
    versions: dict[str, str]
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The largest relative difference of a loss, and of a tensor's change, with the tensor's name."""

    loss: float
    change: float
    tensor: str

    @property
    def ok(self) -> bool:
        """Whether both are within tolerance; nan is not."""
        return self.loss <= LOSS and self.change <= CHANGE


def read(artifact: Path, out: Path) -> Outcome:
    """The outcome of a finished run.

    Raises OSError or a LoracDeployError where it is not finished, ValueError where a tensor that trains kept its value:
    comparing that would show nothing.
    """
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    start, end = (load_adapter(folder / ADAPTER).tensors for folder in (artifact, out))
    manifest = load(artifact)
    start = batchnorm_tensors(artifact, manifest) | start
    changes = {name: value.astype(np.float64) - start[name] for name, value in end.items()}
    if idle := [t.name for t in manifest.trainables if not np.any(changes[t.name])]:
        raise ValueError(f"{out}: training changed nothing in {', '.join(idle)}")
    return Outcome(tuple(report["losses"]), changes, report["versions"], report["step_seconds"])


def compare(found: Outcome, expected: Outcome) -> Deviation:
    """How far ``found`` is from ``expected``. Raises ValueError if they are not of the same run."""
    if len(found.losses) != len(expected.losses) or found.changes.keys() != expected.changes.keys():
        raise ValueError(
            f"not the same run: {len(found.losses)} steps and {len(found.changes)} tensors, expected "
            f"{len(expected.losses)} and {len(expected.changes)}"
        )
    losses = np.abs(np.subtract(found.losses, expected.losses)) / np.abs(expected.losses)
    relative = {name: _distance(found.changes[name], change) for name, change in expected.changes.items()}
    worst = max(relative, key=lambda n: (np.isnan(relative[n]), relative[n]))
    return Deviation(float(losses.max()), relative[worst], worst)


def _distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """||found - expected|| / ||expected||; where nothing should change, 0 or infinity."""
    distance, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return float(distance / norm)


def version_problem(name: str, versions: dict[str, str]) -> str | None:
    """Why an environment is not what its ``name``, PYTHON-ENGINE, says; None if it is.

    >>> version_problem("3.10-1.19.2", {"python": "3.10.13", "onnxruntime": "1.19.2", "numpy": "1.26.4"})
    >>> version_problem("3.13-newest", {"python": "3.13.0", "onnxruntime": "1.31.1", "numpy": "1.26.4"})
    '3.13-newest holds python 3.13.0, onnxruntime 1.31.1, numpy 1.26.4'
    """
    python, _, engine = name.partition("-")
    right = versions["python"].startswith(f"{python}.")
    if engine == "newest":
        right = right and int(versions["numpy"].split(".")[0]) >= 2
    else:
        right = right and versions["onnxruntime"] == engine
    held = ", ".join(f"{package} {versions[package]}" for package in ("python", "onnxruntime", "numpy"))
    return None if right else f"{name} holds {held}"
