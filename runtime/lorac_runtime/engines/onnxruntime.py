"""The engine ``onnxruntime``: training steps that are plain ONNX graphs, on any onnxruntime from 1.17 on.

A run is repeatable to the last bit on one machine with the same version and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.adapter import load_adapter, most_bytes, to_manifest_coordinates
from lorac_runtime.engines import statistics, wheel
from lorac_runtime.engines import step_graph as sg
from lorac_runtime.engines import training_state as ts
from lorac_runtime.engines.carried import Carried, StepSession
from lorac_runtime.engines.folded import FoldedBatchnorm
from lorac_runtime.engines.graph_files import GraphFiles
from lorac_runtime.engines.native import return_freed_memory, translated
from lorac_runtime.engines.prefix import Prefix
from lorac_runtime.errors import CheckpointError, DataError, EngineError
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import ADAPTER, Manifest
from lorac_runtime.patch import batchnorm_tensors
from lorac_runtime.tasks import CUSTOM, weight_of

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64] | Mapping[str, Array]
Batch = Array | Mapping[str, Array]

NAME = "onnxruntime"


def require() -> None:
    """Raise EngineError if the package that this engine needs is missing."""
    wheel.load_inference()


def open(folder: Path, manifest: Manifest, *, threads: int | None, micro_batch: int | None) -> OnnxRuntime:
    """Open the artifact in ``folder``; see `lorac_runtime.engines.open_engine`."""
    return OnnxRuntime(folder, manifest, threads=threads, micro_batch=micro_batch)


class OnnxRuntime:
    """`lorac_runtime.engines.Engine` on step graphs. Sessions hold the weights, so few are open at a time.

    Where the artifact has a frozen front, `prefix` runs that, and stays open beside the session that steps.
    """

    name = NAME

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None, micro_batch: int | None) -> None:
        if micro_batch is not None and manifest.moving_statistics:
            raise EngineError(
                "micro-batches do not go with BN policy 'batch': statistics are those of the whole batch. "
                "Leave --micro-batch out, or export with another policy"
            )
        if micro_batch is not None and manifest.kind == CUSTOM:
            raise EngineError(
                "micro-batches do not go with a loss graph, which may do anything with a batch (count what is in it, "
                "say): leave --micro-batch out, and choose a smaller --batch-size instead"
            )
        return_freed_memory()
        self._ort = wheel.load_inference()
        self.version = str(self._ort.__version__)
        self._folder, self._manifest, self._micro_batch = folder, manifest, micro_batch
        self._files = GraphFiles(NAME, self._ort, folder, threads)
        self._sessions: dict[str, Any] = {}
        self.prefix = Prefix(NAME, self._files, manifest, threads) if manifest.features else None
        self._batchnorm = FoldedBatchnorm(folder, manifest)
        self._layout = self._read_layout()
        start = self._start()
        self._fixed = {n: start[n] for n in fixed_tensors(manifest.adapters, manifest.trainables)}
        self._affine = {n: v for n, v in start.items() if n not in self._fixed and n not in self._layout.tensors}
        self._begin({n: start[n] for n in self._layout.tensors})

    def _read_layout(self) -> sg.Layout:
        """From a graph that steps the optimizer, which is checked without the time that optimizing it takes.

        Where nothing trains there is no such graph, and nothing carries over.
        """
        if not self._manifest.trainables:
            return sg.Layout({}, (), ())
        name = sg.TRAIN if self._micro_batch is None else sg.OPTIMIZER
        session = self._files.open(name, optimized=False)
        self._files.read_weights(session)
        layout = sg.read_layout(session, self._manifest, str(self._folder / name))
        sg.check(session, name, self._manifest, layout, where=str(self._folder / name))
        return layout

    def _start(self) -> dict[str, Floats]:
        """All tensors of the artifact's adapter, and under ``batch`` weight and bias of every BN."""
        manifest, folder = self._manifest, self._folder
        norms = batchnorm_tensors(folder, manifest)
        own = to_manifest_coordinates(manifest, norms, load_adapter(folder / ADAPTER))
        affine = [n for bn in manifest.batchnorms for n in (bn.weight, bn.bias)]
        live = {n: norms[n] for n in affine} if manifest.moving_statistics else {}
        return live | {n: v for n, v in own.items() if n not in self._batchnorm.tensors}

    def _begin(self, tensors: Mapping[str, Array]) -> None:
        """Carry these tensors, and an optimizer that has not made a step."""
        layout = self._layout
        memory = {n: np.zeros(shape, np.float32) for n, shape in layout.sizes(layout.slots).items()}
        self._carried = Carried(self._ort, {**tensors, **memory, sg.STEP: np.zeros((), np.int64)})
        gradients = {n: np.zeros(shape, np.float32) for n, shape in layout.sizes([sg.PACKED_GRADIENT]).items()}
        self._gradients = Carried(self._ort, gradients if self._micro_batch else {})

    def inputs(self, images: Array) -> dict[str, Array]:
        """See `Engine.inputs`."""
        if self.prefix is not None:
            return dict(self.prefix.features(images))
        return {self._manifest.input.name: np.ascontiguousarray(images)}

    def train_step(self, batch: Batch, labels: Labels | None, lr: float) -> float:
        """See `Engine.train_step`."""
        inputs, count = self._taken_in(batch)
        if self._manifest.moving_statistics:
            for bn in self._manifest.batchnorms:
                statistics.samples(bn, count)
        with np.errstate(over="ignore"):  # a rate beyond float32 is infinite, and makes itself felt
            rate = {sg.LR: np.array(lr, np.float32)}
        if self._micro_batch is not None:
            return self._train_in_parts(inputs, labels, count, rate)
        (session,) = self._opened(sg.TRAIN)
        with translated(NAME, "train"):
            found = session.run(self._feeds(inputs, labels, slice(0, count)) | rate)
        return self._taken(found[sg.LOSS], found[sg.NORM])

    def _taken_in(self, batch: Batch) -> tuple[dict[str, Array], int]:
        """(inputs of a step, number of images)."""
        inputs = dict(batch) if isinstance(batch, Mapping) else self.inputs(batch)
        return inputs, len(next(iter(inputs.values())))

    def _train_in_parts(
        self, inputs: dict[str, Array], labels: Labels | None, count: int, rate: dict[str, Array]
    ) -> float:
        gradient, optimizer = self._opened(sg.GRADIENT, sg.OPTIMIZER)
        for vector in self._gradients.values.values():
            vector[...] = 0
        loss = 0.0
        with translated(NAME, "train"):
            for part, share in self._shares(labels, count):
                feeds = self._feeds(inputs, labels, part) | {sg.WEIGHT: np.array(share, np.float32)}
                loss += share * gradient.run(feeds)[sg.LOSS]
                self._gradients.swap()
            return self._taken(loss, optimizer.run(rate)[sg.NORM] if math.isfinite(loss) else math.nan)

    def _taken(self, loss: float, norm: float) -> float:
        """Keep what the step computed, if it is sound; returns the loss, or nan where only its gradient is not."""
        if not math.isfinite(loss):
            return loss
        if not math.isfinite(norm):
            return math.nan
        self._carried.swap()
        return loss

    def eval_step(self, batch: Batch, labels: Labels | None) -> tuple[float, Floats]:
        """See `Engine.eval_step`."""
        inputs, count = self._taken_in(batch)
        (session,) = self._opened(sg.EVAL)
        tensors = {n: self._carried.values[n] for n in self._layout.tensors}
        loss, logits = 0.0, []
        names = [sg.LOSS, *sg.outputs(self._manifest)]
        for part, share in self._shares(labels, count):
            with translated(NAME, "evaluate"):
                found = session.run(names, self._feeds(inputs, labels, part) | tensors)
            loss += share * float(found[0])
            logits.append(_side_by_side(found[1:]))
        return loss, logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _shares(self, labels: Labels | None, count: int) -> list[tuple[slice, float]]:
        """The pieces of a batch, and how much each weighs in the mean loss."""
        parts, loss = self._parts(count), self._manifest.training.loss
        weights = [weight_of(self._manifest.task, loss, labels, part, count) for part in parts]
        total = sum(weights) or 1.0
        return [(part, 1.0 if len(parts) == 1 else weight / total) for part, weight in zip(parts, weights, strict=True)]

    def _parts(self, count: int) -> list[slice]:
        if self._micro_batch is None:
            return [slice(0, count)]
        starts = range(0, count, self._micro_batch)
        return [slice(start, min(start + self._micro_batch, count)) for start in starts]

    def _feeds(self, inputs: Mapping[str, Array], labels: Labels | None, part: slice) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(value[part]) for name, value in inputs.items()}
        if sg.has_labels(self._manifest):
            if labels is None:
                raise DataError(f"the loss {self._manifest.training.loss} needs labels, and there are none")
            feeds |= sg.targets(self._manifest, labels, part)
        return feeds

    def state(self) -> dict[str, Floats]:
        """See `Engine.state`."""
        held = {n: self._carried.values[n] for n in self._layout.tensors}
        held |= self._batchnorm.tensors | self._affine | self._fixed
        return {name: value.copy() for name, value in held.items()}

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """See `Engine.load_state`."""
        trained = [t.name for t in self._manifest.trainables]
        values = ts.checked_tensors(tensors, self.state(), needed=trained, fixed=self._fixed)
        self._replace(self._batchnorm.change({n: values.pop(n, v) for n, v in self._batchnorm.tensors.items()}))
        affine = {n: values.pop(n, v) for n, v in self._affine.items()}
        self._replace({n: v for n, v in affine.items() if not np.array_equal(v, self._affine[n])})
        self._affine = affine
        self._set(values)

    def _set(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            self._carried.values[name][...] = value

    def recalibrate(self, batches: Iterable[Array]) -> None:
        """See `Engine.recalibrate`."""
        self._close()
        new = self._batchnorm.estimated(self._ort, self._files.options(), batches, engine=NAME)
        moved = self._batchnorm.moved(new, {t.name: self._carried.values[t.name] for t in self._manifest.trainables})
        self._replace(self._batchnorm.change(new))
        self._set(moved)

    def _replace(self, frozen: Mapping[str, Floats]) -> None:
        """Give frozen tensors other values."""
        if frozen:
            self._files.replaced |= frozen
            self._close()  # sessions hold the old ones

    def _close(self) -> None:
        self._sessions.clear()
        if self.prefix is not None:
            self.prefix.close()

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        values = self._carried.values
        packed = {slot: [values[n] for n in self._layout.sizes([slot])] for slot in self._layout.slots}
        memory = {slot: self._unpacked(vectors) for slot, vectors in packed.items()}
        ts.write(folder, ts.TrainingState(self.state(), memory, int(values[sg.STEP])))

    def _unpacked(self, vectors: list[Floats]) -> dict[str, Floats]:
        """Tensors by name from the packed vectors of all groups."""
        found: dict[str, Floats] = {}
        for vector, names in zip(vectors, self._layout.groups, strict=True):
            shapes = [self._layout.tensors[n] for n in names]
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            parts = np.split(vector, ends[:-1])
            found |= {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return found

    def restore(self, folder: Path) -> None:
        """See `Engine.restore`."""
        state = ts.read(folder, most_bytes(self._manifest, copies=ts.COPIES))
        trained = {t.name: t.shape for t in self._manifest.trainables}
        ts.check_memory(state, self._layout.slots, trained)
        try:
            self.load_state(state.parameters)
        except ValueError as err:
            raise CheckpointError(f"{folder} cannot be read: {err}") from err
        for slot, values in state.memory.items():
            for k, names in enumerate(self._layout.groups):
                self._carried.values[f"{slot}.{k}"][...] = np.concatenate([values[n].reshape(-1) for n in names])
        self._carried.values[sg.STEP][...] = state.step

    def _opened(self, *names: str) -> list[Any]:
        """Sessions of these graphs, any others closed: each holds all weights."""
        for other in self._sessions.keys() - set(names):
            del self._sessions[other]
        for name in names:
            if name not in self._sessions:
                self._sessions[name] = self._checked(name)
        return [self._sessions[name] for name in names]

    def _checked(self, name: str) -> Any:
        session = self._files.open(name)
        sg.check(session, name, self._manifest, self._layout, where=str(self._folder / name))
        if name == sg.EVAL:
            return session
        scalars = [n for n in (sg.LOSS, sg.NORM) if n in sg.ports(session.get_outputs())]
        return StepSession(self._ort, session, (self._carried, self._gradients), scalars)


def _side_by_side(outputs: list[Floats]) -> Floats:
    """One output as it is; several as (batch, all of them)."""
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)
