"""What every training engine can do, and how to open the one that an artifact was made for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import EngineError
from lorac_runtime.manifest import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

MODULES = {"onnxruntime-training": "lorac_runtime.engines.onnxruntime_training"}


class Engine(Protocol):
    """A model that trains. ``images`` are a batch as the artifact's input spec says, ``labels`` (batch,) int64.

    All verbs raise EngineError when the engine refuses, MemoryError when memory does not suffice.
    """

    name: str
    version: str

    def train_step(self, images: Array, labels: Labels, lr: float) -> float:
        """One optimizer step with learning rate ``lr``; returns the loss before it.

        A loss that is not finite is returned without changing a weight. Under BN policy ``batch`` a batch
        that holds one position of a BN's input raises DataError: it has no variance.
        """

    def eval_step(self, images: Array, labels: Labels) -> tuple[float, Floats]:
        """(mean loss, logits (batch, classes)) in evaluation mode; changes nothing."""

    def state(self) -> dict[str, Floats]:
        """Copies of all trainable tensors by name; under ``batch`` and ``recalibrate`` also all BN tensors."""

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """Set every trainable tensor, and BN tensors where given; under ``recalibrate`` the base is folded anew.

        The optimizer's memory stays. Raises ValueError listing missing and unknown names and other shapes.
        """

    def recalibrate(self, batches: Iterable[Array]) -> None:
        """Re-estimate BN statistics on image batches, as PyTorch's cumulative average (momentum None) does.

        Only under BN policy ``recalibrate`` (ValueError otherwise); raises DataError without variance.
        """

    def save(self, folder: Path) -> None:
        """Write all that `restore` needs, optimizer state included, into the existing ``folder``."""

    def restore(self, folder: Path) -> None:
        """Go back to what `save` wrote; training goes on as if it had never stopped.

        Raises CheckpointError if the files are missing or damaged.
        """


def open_engine(folder: Path, manifest: Manifest, *, threads: int | None = None) -> Engine:
    """Open the engine that the artifact in ``folder`` was made for; ``threads`` None leaves the choice to it.

    Raises EngineError if the artifact holds files for none of the engines known here, or if the package that
    the engine needs is missing.
    """
    for name, module in MODULES.items():
        if name in manifest.engines:
            engine: Engine = importlib.import_module(module).open(folder, manifest, threads=threads)
            return engine
    raise EngineError(
        f"{folder} was made for {', '.join(manifest.engines) or 'no engine'}; this runtime has "
        f"{', '.join(MODULES)}: export the artifact for one of these"
    )
