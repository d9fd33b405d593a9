"""The engine ``onnxruntime-training``: gradient graphs of onnxruntime-training-cpu 1.19.2, without torch or onnx.

A run is repeatable to the last bit on one machine with the same number of threads, except where gradients are
clipped: the library adds up their common norm in an order that differs between sessions (some 1e-7 of the step).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.adapter import most_bytes
from lorac_runtime.engines import statistics, wheel
from lorac_runtime.engines import training_state as ts
from lorac_runtime.engines.folded import FoldedBatchnorm, batchnorm_names
from lorac_runtime.engines.native import session_options, translated
from lorac_runtime.engines.native_checkpoint import NativeCheckpoint
from lorac_runtime.errors import CheckpointError, DataError, EngineError, listed
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Batch = Array | Mapping[str, Array]

NAME = "onnxruntime-training"
CHECKPOINT = "checkpoint"
SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}  # what "momentum0", "momentum1" of the native file mean


def require() -> None:
    """Raise EngineError if the package that this engine needs is missing."""
    wheel.load()


def open(folder: Path, manifest: Manifest, *, threads: int | None, micro_batch: int | None) -> OnnxRuntimeTraining:
    """Open the artifact in ``folder``; see `lorac_runtime.engines.open_engine`."""
    if micro_batch is not None:
        raise EngineError(
            f"the engine {NAME} has no micro-batches: leave --micro-batch out, or use the engine onnxruntime "
            f"with an artifact that has its files (this one has {', '.join(manifest.engines)})"
        )
    return OnnxRuntimeTraining(folder, manifest, threads=threads)


class OnnxRuntimeTraining:
    """`lorac_runtime.engines.Engine` on onnxruntime-training's `Module` and `Optimizer`."""

    name = NAME
    prefix = None

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None) -> None:
        self._wheel = wheel.load()
        self.version = self._wheel.version
        self._folder, self._manifest = folder, manifest
        self._options = session_options(self._wheel.ort, threads)
        self._trained = [t.name for t in manifest.trainables]
        # Under `batch` the graph holds BN itself. Under `recalibrate` it was folded; its tensors are kept there.
        self._batchnorm = FoldedBatchnorm(folder, manifest)
        self._open(folder / CHECKPOINT)

    def _open(self, checkpoint: Path) -> None:
        api, folder = self._wheel.api, self._folder
        with translated(NAME, f"open {checkpoint}"):
            self._state = api.CheckpointState.load_checkpoint(checkpoint)
        with translated(NAME, f"open the training files of {folder}"):
            self._module = api.Module(
                folder / "training_model.onnx",
                self._state,
                folder / "eval_model.onnx",
                session_options=self._options,
            )
            self._optimizer = api.Optimizer(folder / "optimizer_model.onnx", self._module)
        self._check_agreement()

    def _check_agreement(self) -> None:
        """The graphs and the checkpoint must be those that the manifest describes."""
        manifest, parameters = self._manifest, self._state.parameters
        wanted = {t.name: t.shape for t in manifest.trainables}
        found = {n: p.data.shape for n, p in parameters if p.requires_grad}
        problems = [f"{n} does not train" for n in sorted(wanted.keys() - found)]
        problems += [f"{n} trains, the manifest does not say so" for n in sorted(found.keys() - wanted)]
        different = [n for n in sorted(wanted.keys() & found) if found[n] != wanted[n]]
        problems += [f"{n} has shape {found[n]}, expected {wanted[n]}" for n in different]
        problems += [f"{n} is not in its checkpoint" for n in _settable(manifest) if n not in parameters]
        inputs, expected = self._module.input_names(), [manifest.input.name, "labels"]
        if inputs != expected:
            problems.append(f"its inputs are {inputs}, expected {expected}")
        if manifest.training.optimizer not in SLOTS:
            problems.append(f"its optimizer is {manifest.training.optimizer!r}, expected {' or '.join(SLOTS)}")
        if problems:
            raise EngineError(listed(f"the training files of {self._folder} do not fit its manifest:", problems))

    def inputs(self, images: Array) -> dict[str, Array]:
        """See `Engine.inputs`."""
        return {self._manifest.input.name: np.ascontiguousarray(images)}

    def train_step(self, batch: Batch, labels: Labels | None, lr: float) -> float:
        """See `Engine.train_step`."""
        images, labels = self._images(batch), _given(labels)
        batchnorms = self._manifest.batchnorms if self._manifest.moving_statistics else ()
        counts = [statistics.samples(bn, len(images)) for bn in batchnorms]
        before = [self._get(bn.running_var) for bn in batchnorms]
        with translated(NAME, "train"):
            self._optimizer.set_learning_rate(lr)
            self._module.train()
            loss = float(self._module(images, labels)[0])
            if math.isfinite(loss):
                self._optimizer.step()
            self._module.lazy_reset_grad()
        for bn, old, count in zip(batchnorms, before, counts, strict=True):
            moved = self._get(bn.running_var)  # by the biased variance, unlike PyTorch's
            value = statistics.unbiased_running_var(old, moved, momentum=bn.momentum, count=count)
            self._set({bn.running_var: value})
        return loss

    def _images(self, batch: Batch) -> Array:
        inputs = batch if isinstance(batch, Mapping) else self.inputs(batch)
        return inputs[self._manifest.input.name]

    def eval_step(self, batch: Batch, labels: Labels | None) -> tuple[float, Floats]:
        """See `Engine.eval_step`."""
        images, labels = self._images(batch), _given(labels)
        with translated(NAME, "evaluate"):
            self._module.eval()
            loss, logits = self._module(images, labels)
        return float(loss), logits

    def state(self) -> dict[str, Floats]:
        """See `Engine.state`."""
        kept = {n: v.copy() for n, v in self._batchnorm.tensors.items()}
        return kept | {n: self._get(n) for n in self._held()}

    def _held(self) -> list[str]:
        """Names of the state that lie in the native checkpoint."""
        manifest = self._manifest
        norms = batchnorm_names(manifest) if manifest.moving_statistics else []
        return list(dict.fromkeys([*self._trained, *fixed_tensors(manifest.adapters, manifest.trainables), *norms]))

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """See `Engine.load_state`."""
        current = self.state()
        fixed = {n: current[n] for n in fixed_tensors(self._manifest.adapters, self._manifest.trainables)}
        values = ts.checked_tensors(tensors, current, needed=self._trained, fixed=fixed)
        self._change_batchnorm({n: values.pop(n, v) for n, v in self._batchnorm.tensors.items()})
        self._set(values)

    def recalibrate(self, batches: Iterable[Array]) -> None:
        """See `Engine.recalibrate`."""
        new = self._batchnorm.estimated(self._wheel.ort, self._options, batches, engine=NAME)
        moved = self._batchnorm.moved(new, {n: self._get(n) for n in self._trained})
        self._change_batchnorm(new)
        self._set(moved)

    def _change_batchnorm(self, new: dict[str, Floats]) -> None:
        """Fold the base with other BN tensors; trained tensors stay as they are."""
        self._set(self._batchnorm.change(new))

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        native = self._native(folder)
        slots = SLOTS[self._manifest.training.optimizer]
        memory = {slot: {n: native.moments[n][f"momentum{i}"] for n in self._trained} for i, slot in enumerate(slots)}
        ts.write(folder, ts.TrainingState(self.state(), memory, _steps(native)))

    def restore(self, folder: Path) -> None:
        """See `Engine.restore`."""
        state = ts.read(folder, most_bytes(self._manifest, copies=ts.COPIES))
        shapes = {t.name: t.shape for t in self._manifest.trainables}
        ts.check_memory(state, SLOTS[self._manifest.training.optimizer], shapes)
        try:
            if self._native(folder).steps is None:
                self._make_a_step()  # the file has no place for the number of steps before the first one
            self.load_state(state.parameters)
            native = self._native(folder)
            _overwrite(native, state)
            self._open_content(folder, native.content)
        except (EngineError, ValueError) as err:
            raise CheckpointError(f"{folder} cannot be restored: {err}") from err

    def _native(self, folder: Path) -> NativeCheckpoint:
        """The library's own checkpoint of the state as it is, by way of a file in ``folder`` that is removed again."""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / CHECKPOINT
            with translated(NAME, f"write {path}"):
                self._wheel.api.CheckpointState.save_checkpoint(self._state, path, include_optimizer_state=True)
            return NativeCheckpoint(bytearray(path.read_bytes()))

    def _open_content(self, folder: Path, content: bytearray) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / CHECKPOINT
            path.write_bytes(content)
            self._open(path)

    def _make_a_step(self) -> None:
        """A step on blank images whose outcome does not matter."""
        spec = self._manifest.input
        blank = np.zeros((2, *(spec.raw_shape if spec.in_graph else spec.shape)))
        with translated(NAME, "make a step"):
            self._module.train()
            self._module(blank.astype(np.uint8 if spec.in_graph else np.float32), np.zeros(2, np.int64))
            self._optimizer.step()
            self._module.lazy_reset_grad()

    def _get(self, name: str) -> Floats:
        value: Floats = self._state.parameters[name].data.copy()
        return value

    def _set(self, values: Mapping[str, Floats]) -> None:
        for name, value in values.items():
            with translated(NAME, f"set {name}"):
                self._state.parameters[name] = np.ascontiguousarray(value)


def _given(labels: Labels | None) -> npt.NDArray[np.int64]:
    if labels is None or isinstance(labels, Mapping):
        raise DataError(f"the engine {NAME} has no loss without labels, and there are none")
    return labels


def _settable(manifest: Manifest) -> list[str]:
    """Tensors in the native checkpoint that this engine sets although no gradient reaches them."""
    fixed = list(fixed_tensors(manifest.adapters, manifest.trainables))
    if manifest.moving_statistics:
        return fixed + batchnorm_names(manifest)
    folded = [n for bn in manifest.batchnorms for n in bn.folded_into]
    return fixed + folded if manifest.bn_policy == "recalibrate" else fixed


def _steps(native: NativeCheckpoint) -> int:
    return 0 if native.steps is None else int(native.steps[0])


def _overwrite(native: NativeCheckpoint, state: ts.TrainingState) -> None:
    """Put the optimizer's memory of ``state`` into the bytes of a checkpoint that has made a step."""
    if native.steps is None:
        raise EngineError("the optimizer does not count its steps")
    native.steps[0] = state.step
    for i, values in enumerate(state.memory.values()):
        for name, value in values.items():
            native.moments[name][f"momentum{i}"][...] = value
