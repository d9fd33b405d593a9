"""The engine ``onnxruntime-training``: gradient graphs of onnxruntime-training-cpu 1.19.2, without torch or onnx.

A run is repeatable to the last bit on one machine with the same number of threads, except where gradients are
clipped: the library adds up their common norm in an order that differs between sessions (some 1e-7 of the step).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lorac_runtime.engines import statistics, wheel
from lorac_runtime.errors import CheckpointError, EngineError, listed
from lorac_runtime.manifest import Manifest
from lorac_runtime.patch import base_weights, batchnorm_tensors, fused_weights

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

NAME = "onnxruntime-training"
CHECKPOINT = "checkpoint"
BN_FILE = "batchnorm.safetensors"  # beside a saved checkpoint, under BN policy `recalibrate`
WHERE_IN_THE_LIBRARY = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", re.DOTALL)
OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "bad allocation")


def open(folder: Path, manifest: Manifest, *, threads: int | None) -> OnnxRuntimeTraining:
    """Open the artifact in ``folder``; see `lorac_runtime.engines.open_engine`."""
    return OnnxRuntimeTraining(folder, manifest, threads=threads)


class OnnxRuntimeTraining:
    """`lorac_runtime.engines.Engine` on onnxruntime-training's `Module` and `Optimizer`."""

    name = NAME

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None) -> None:
        self._wheel = wheel.load()
        self.version = self._wheel.version
        self._folder, self._manifest = folder, manifest
        self._options = _session_options(self._wheel.ort, threads)
        self._trained = [t.name for t in manifest.trainables]
        # Under `batch` the graph holds BN itself. Under `recalibrate` it was folded; its tensors are kept here.
        self._batchnorm = _folded_batchnorm(folder, manifest)
        self._open(folder / CHECKPOINT)

    def _open(self, checkpoint: Path) -> None:
        api, folder = self._wheel.api, self._folder
        with _translated(f"open {checkpoint}"):
            self._state = api.CheckpointState.load_checkpoint(checkpoint)
        with _translated(f"open the training files of {folder}"):
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
        if problems:
            raise EngineError(listed(f"the training files of {self._folder} do not fit its manifest:", problems))

    def train_step(self, images: Array, labels: Labels, lr: float) -> float:
        """See `Engine.train_step`."""
        batchnorms = self._manifest.batchnorms if self._manifest.bn_policy == "batch" else ()
        counts = [statistics.samples(bn, len(images)) for bn in batchnorms]
        before = [self._get(bn.running_var) for bn in batchnorms]
        with _translated("train"):
            self._optimizer.set_learning_rate(lr)
            self._module.train()
            loss = float(self._module(np.ascontiguousarray(images), labels)[0])
            if math.isfinite(loss):
                self._optimizer.step()
            self._module.lazy_reset_grad()
        for bn, old, count in zip(batchnorms, before, counts, strict=True):
            moved = self._get(bn.running_var)  # by the biased variance, unlike PyTorch's
            value = statistics.unbiased_running_var(old, moved, momentum=bn.momentum, count=count)
            self._set(bn.running_var, value)
        return loss

    def eval_step(self, images: Array, labels: Labels) -> tuple[float, Floats]:
        """See `Engine.eval_step`."""
        with _translated("evaluate"):
            self._module.eval()
            loss, logits = self._module(np.ascontiguousarray(images), labels)
        return float(loss), logits

    def state(self) -> dict[str, Floats]:
        """See `Engine.state`."""
        kept = {n: v.copy() for n, v in self._batchnorm.items()}
        return kept | {n: self._get(n) for n in self._held()}

    def _held(self) -> list[str]:
        """Names of the state that lie in the native checkpoint."""
        if self._manifest.bn_policy != "batch":
            return self._trained
        return list(dict.fromkeys([*self._trained, *_settable(self._manifest)]))

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """See `Engine.load_state`."""
        shapes = {n: v.shape for n, v in self.state().items()}
        problems = [f"{n} is missing" for n in self._trained if n not in tensors]
        problems += [f"{n} is unknown" for n in tensors if n not in shapes]
        different = [n for n in tensors if n in shapes and tensors[n].shape != shapes[n]]
        problems += [f"{n} has shape {tensors[n].shape}, expected {shapes[n]}" for n in different]
        if problems:
            raise ValueError(listed("not a state of this model:", problems))
        values = {n: v.astype(np.float32) for n, v in tensors.items()}
        self._change_batchnorm({n: values.pop(n, v) for n, v in self._batchnorm.items()})
        for name, value in values.items():
            self._set(name, value)

    def recalibrate(self, batches: Iterable[Array]) -> None:
        """See `Engine.recalibrate`."""
        manifest, old = self._manifest, self._batchnorm
        if manifest.bn_policy != "recalibrate":
            raise ValueError(f"the artifact's BN policy is {manifest.bn_policy!r}, not 'recalibrate'")
        found = self._batch_statistics(batches)
        new = old | statistics.cumulative_average(manifest.batchnorms, found)
        trained = {n: self._get(n) for n in self._trained}
        self._change_batchnorm(new)
        for bn in manifest.batchnorms:
            for name, value in statistics.moved_trained(manifest, bn, trained, old=old, new=new).items():
                self._set(name, value)

    def _batch_statistics(self, batches: Iterable[Array]) -> Iterator[tuple[int, dict[str, Array]]]:
        path = self._folder / "stats_model.onnx"
        with _translated(f"open {path}"):
            session = self._wheel.ort.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        for images in batches:
            with _translated("estimate BN statistics"):
                values = session.run(None, {self._manifest.input.name: images})
            yield len(images), dict(zip(names, values, strict=True))

    def _change_batchnorm(self, new: dict[str, Floats]) -> None:
        """Fold the base with other BN tensors; trained tensors stay as they are."""
        if all(np.array_equal(v, new[n]) for n, v in self._batchnorm.items()):
            return
        plain = dataclasses.replace(self._manifest, adapters=(), trainables=())
        base = base_weights(self._folder, self._manifest)
        folded = fused_weights(plain, base, new, batchnorm_tensors(self._folder, self._manifest))
        for name in folded.keys() - set(self._trained):
            self._set(name, folded[name])
        self._batchnorm = new

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        with _translated(f"write {folder / CHECKPOINT}"):
            self._wheel.api.CheckpointState.save_checkpoint(
                self._state, folder / CHECKPOINT, include_optimizer_state=True
            )
        if self._batchnorm:
            save_file(self._batchnorm, folder / BN_FILE)

    def restore(self, folder: Path) -> None:
        """See `Engine.restore`."""
        try:
            if self._batchnorm:
                self._batchnorm = load_file(folder / BN_FILE)
            self._open(folder / CHECKPOINT)
        except (EngineError, OSError, SafetensorError) as err:
            raise CheckpointError(f"{folder} cannot be read: {err}") from err

    def _get(self, name: str) -> Floats:
        value: Floats = self._state.parameters[name].data.copy()
        return value

    def _set(self, name: str, value: Floats) -> None:
        with _translated(f"set {name}"):
            self._state.parameters[name] = np.ascontiguousarray(value)


def _session_options(ort: Any, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = wheel.FATAL
    options.intra_op_num_threads = threads or 0
    # Three sessions with a thread pool each: threads that spin while another session works slow it down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _folded_batchnorm(folder: Path, manifest: Manifest) -> dict[str, Floats]:
    if manifest.bn_policy != "recalibrate":
        return {}
    trained = {t.name for t in manifest.trainables}
    tensors = batchnorm_tensors(folder, manifest)
    return {n: tensors[n] for n in _batchnorm_names(manifest) if n not in trained}


def _batchnorm_names(manifest: Manifest) -> list[str]:
    return [n for bn in manifest.batchnorms for n in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]


def _settable(manifest: Manifest) -> list[str]:
    """Tensors in the native checkpoint that this engine sets although no gradient reaches them."""
    if manifest.bn_policy == "batch":
        return _batchnorm_names(manifest)
    folded = [n for bn in manifest.batchnorms for n in bn.folded_into]
    return folded if manifest.bn_policy == "recalibrate" else []


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    """Turn what the native library raises into EngineError, or MemoryError where that is the reason."""
    try:
        yield
    except Exception as err:
        # The training API raises RuntimeError; the exceptions of InferenceSession share only this module.
        if not isinstance(err, RuntimeError) and not type(err).__module__.startswith("onnxruntime."):
            raise
        text = WHERE_IN_THE_LIBRARY.sub("", str(err)).strip()
        if any(sign in text.lower() for sign in OUT_OF_MEMORY):
            raise MemoryError(f"onnxruntime-training could not {action}") from err
        raise EngineError(f"onnxruntime-training could not {action}: {text}") from err
