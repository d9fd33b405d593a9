"""What every training engine can do, and how to open one that an artifact was made for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines.prefix import Prefix
from lorac_runtime.errors import EngineError, listed
from lorac_runtime.manifest import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64] | Mapping[str, Array]  # of classification, or the targets of another task by name
Batch = Array | Mapping[str, Array]  # images, or what `Engine.inputs` made of them

AUTO = "auto"
MODULES = {  # in order of preference
    "onnxruntime": "lorac_runtime.engines.onnxruntime",
    "onnxruntime-training": "lorac_runtime.engines.onnxruntime_training",
}

log = logging.getLogger(__name__)


class Engine(Protocol):
    """A model that trains. Images are a batch as the artifact's input spec says, ``labels`` (batch,) int64, or None for
    a loss that needs none (DataError for any other); of another task than classification the targets by name.

    A step takes images, or what `inputs` gives for them, which may be kept: it stays right as long as `prefix` has the
    same key. All verbs raise EngineError when the engine refuses, MemoryError when memory does not suffice.
    """

    name: str
    version: str

    @property
    def prefix(self) -> Prefix | None:
        """What computes the features that steps start from; None where they start from the images."""

    def inputs(self, images: Array) -> Mapping[str, Array]:
        """What a step takes for these images, by name: features where there is a `prefix`, else the images."""

    def train_step(self, batch: Batch, labels: Labels | None, lr: float) -> float:
        """One optimizer step with learning rate ``lr``; returns the loss before it.

        A loss that is not finite is returned without changing a weight; where the loss is finite and only its
        gradient is not, an engine may return nan likewise. Under BN policy ``batch`` a batch
        that holds one position of a BN's input raises DataError: it has no variance.
        """

    def eval_step(self, batch: Batch, labels: Labels | None) -> tuple[float, Floats]:
        """(mean loss, logits (batch, classes)) in evaluation mode; changes nothing.

        Of another task than classification it is the network's output, (batch, ...); several outputs stand side by
        side, (batch, all of them).
        """

    def state(self) -> dict[str, Floats]:
        """Copies of all trainable tensors by name, and of what is fixed in adapters, such as a frozen lora_a.

        Under ``batch`` and ``recalibrate`` also of all BN tensors.
        """

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """Set every trainable tensor, and BN tensors where given; under ``recalibrate`` the base is folded anew.

        The optimizer's memory stays. Raises ValueError listing missing and unknown names, other shapes, and
        tensors with other values that the engine cannot set, because its graphs hold them as constants.
        """

    def recalibrate(self, batches: Iterable[Array]) -> None:
        """Re-estimate BN statistics on image batches, as PyTorch's cumulative average (momentum None) does.

        Only under BN policy ``recalibrate`` (ValueError otherwise); raises DataError without variance.
        """

    def save(self, folder: Path) -> None:
        """Write all that `restore` needs, optimizer state included, into the existing ``folder``.

        The file is the same for every engine (`engines.training_state`), so that another one may go on.
        """

    def restore(self, folder: Path) -> None:
        """Go back to what `save` wrote; training goes on as if it had never stopped.

        Raises CheckpointError if the files are missing or damaged.
        """


def open_engine(
    folder: Path, manifest: Manifest, *, engine: str = AUTO, threads: int | None = None, micro_batch: int | None = None
) -> Engine:
    """Open an engine for the artifact in ``folder``; ``threads`` None leaves their number to it.

    ``auto`` takes the first of `MODULES` that the artifact has files for and whose package is installed; which one,
    and why not another, is logged. ``micro_batch`` computes a step in pieces of so many images, in less memory.

    Raises EngineError if the artifact lacks the engine, if the package that it needs is missing, or if it refuses its
    files or ``micro_batch``; ValueError for a name that is no engine's.
    """
    chosen = _automatic(folder, manifest) if engine == AUTO else _named(folder, manifest, engine)
    opened: Engine = chosen.open(folder, manifest, threads=threads, micro_batch=micro_batch)
    return opened


def _named(folder: Path, manifest: Manifest, name: str) -> Any:
    if name not in MODULES:
        raise ValueError(f"engine {name!r} is not one of {', '.join([AUTO, *MODULES])}")
    if name not in manifest.engines:
        raise EngineError(
            f"{folder} has no files for the engine {name}, only for {_made_for(manifest)}: export the artifact again "
            f"for that engine, or choose another one (--engine)"
        )
    return importlib.import_module(MODULES[name])


def _automatic(folder: Path, manifest: Manifest) -> Any:
    passed_over: list[str] = []
    for name in MODULES:
        reason = "the artifact has no files for it"
        if name in manifest.engines:
            module = importlib.import_module(MODULES[name])
            try:
                module.require()
            except EngineError as err:
                reason = str(err)
            else:
                log.info("engine %s%s", name, "".join(f"; not {text}" for text in passed_over))
                return module
        passed_over.append(f"{name}: {reason}")
    if any(name in manifest.engines for name in MODULES):
        raise EngineError(listed(f"no engine for {folder} can be used here:", passed_over))
    raise EngineError(
        f"{folder} was made for {_made_for(manifest)}; this runtime has {', '.join(MODULES)}: "
        "export the artifact for one of these"
    )


def _made_for(manifest: Manifest) -> str:
    return ", ".join(manifest.engines) or "no engine"
