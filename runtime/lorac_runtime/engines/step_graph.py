"""What the step graphs of the engine ``onnxruntime`` take and give, and whether a file is such a graph.

``train_step.onnx`` is a whole step; ``gradient_step.onnx`` and ``optimizer_step.onnx`` are its two halves, for batches
in several pieces; ``eval_step.onnx`` gives loss and logits. Whatever has an output ``X.next`` is fed back as ``X``.
Where a network has a frozen front, ``prefix_step.onnx`` computes its features, which the others take for images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import EngineError, listed
from lorac_runtime.manifest import Manifest, TrainingDefaults

TRAIN, GRADIENT, OPTIMIZER, EVAL = "train_step.onnx", "gradient_step.onnx", "optimizer_step.onnx", "eval_step.onnx"
PREFIX, WEIGHTS_FILE = "prefix_step.onnx", "weights.bin"
LABELS, LR, STEP, WEIGHT = "labels", "lr", "step", "weight"
LOSS, NORM, NEXT, PACKED_GRADIENT = "loss", "gradient_norm", ".next", "gradient"
FLOAT, INT64, UINT8 = "tensor(float)", "tensor(int64)", "tensor(uint8)"
_TYPES = {"int64": INT64, "float32": FLOAT}

Shape = tuple[int, ...]
Labels = npt.NDArray[np.int64] | Mapping[str, npt.NDArray[Any]]
Ports = dict[str, tuple[str, tuple[int | None, ...]]]  # name -> (type, shape); None is the batch


@dataclasses.dataclass(frozen=True)
class Layout:
    """What training carries from step to step: tensors by name, and the optimizer's memory, packed.

    Group K is the concatenation of the tensors ``groups[K]``, each flattened; every slot has a vector per group.
    """

    tensors: dict[str, Shape]
    groups: tuple[tuple[str, ...], ...]
    slots: tuple[str, ...]

    def sizes(self, prefixes: Iterable[str]) -> dict[str, Shape]:
        """Packed vectors ("exp_avg.0", ...) of these prefixes and their shapes."""
        lengths = [sum(math.prod(self.tensors[n]) for n in group) for group in self.groups]
        return {f"{prefix}.{k}": (n,) for prefix in prefixes for k, n in enumerate(lengths)}


def read_layout(session: Any, manifest: Manifest, where: str) -> Layout:
    """The layout that ``session``, of a graph that steps the optimizer, was made with; ``where`` names its file.

    Raises EngineError if its metadata do not fit the manifest.
    """
    metadata, training = session.get_modelmeta().custom_metadata_map, manifest.training
    trained = {t.name: t.shape for t in manifest.trainables}
    groups, problems = _groups(metadata.get("lorac.groups", ""), trained)
    if metadata.get("lorac.optimizer") != training.optimizer:
        given = metadata.get("lorac.optimizer")
        problems.append(f"lorac.optimizer is {given!r}, the manifest says {training.optimizer!r}")
    if problems:
        raise EngineError(listed(f"{where} does not fit its manifest:", problems))
    return Layout(trained | _running_statistics(manifest), groups, slots(training))


def slots(training: TrainingDefaults) -> tuple[str, ...]:
    """What the optimizer remembers of every tensor."""
    if training.optimizer == "sgd":
        return ("momentum",) if training.momentum else ()
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if training.amsgrad else ("exp_avg", "exp_avg_sq")


def _groups(text: str, trained: Mapping[str, Shape]) -> tuple[tuple[tuple[str, ...], ...], list[str]]:
    """(groups, problems) from the JSON text of lorac.groups."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, list) or not all(isinstance(g, list) and all(isinstance(n, str) for n in g) for g in raw):
        return (), [f"lorac.groups should be a list of lists of tensor names, got {text[:60]!r}"]
    names = [name for group in raw for name in group]
    problems = [f"{n} does not train" for n in sorted(trained.keys() - set(names))]
    problems += [f"{n} trains, the manifest does not say so" for n in sorted(set(names) - trained.keys())]
    problems += [f"{n} stands in lorac.groups twice" for n in sorted({n for n in names if names.count(n) > 1})]
    return tuple(tuple(group) for group in raw), problems


def _running_statistics(manifest: Manifest) -> dict[str, Shape]:
    """What moves with every step beside the trained tensors, under the policy ``batch``."""
    if not manifest.moving_statistics:
        return {}
    shapes = {p.tensor: p.shape for p in manifest.patches}
    channels = {bn: math.prod(shapes[bn.folded_into[1]]) for bn in manifest.batchnorms}
    return {name: (c,) for bn, c in channels.items() for name in (bn.running_mean, bn.running_var)}


def ports(arguments: Iterable[Any]) -> Ports:
    """Inputs or outputs of a session."""
    return {a.name: (a.type, tuple(d if isinstance(d, int) else None for d in a.shape)) for a in arguments}


def check(session: Any, name: str, manifest: Manifest, layout: Layout, *, where: str) -> None:
    """Raise EngineError listing every input and output of the graph ``name`` that is not what it should be."""
    _check_ports(session, *_expected(name, manifest, layout), where=where)


def check_prefix(session: Any, manifest: Manifest, *, where: str) -> None:
    """The same of prefix_step.onnx."""
    _check_ports(session, _images(manifest), _features(manifest), where=where)


def _check_ports(session: Any, inputs: Ports, outputs: Ports, *, where: str) -> None:
    found = ports(session.get_inputs())
    problems = [f"input {n} is missing" for n in inputs if n not in found]
    problems += [f"input {n} is unknown" for n in found if n not in inputs]
    problems += _differences("input", found, inputs)
    given = ports(session.get_outputs())
    problems += [f"output {n} is missing" for n in outputs if n not in given]
    problems += _differences("output", given, outputs)
    if problems:
        raise EngineError(listed(f"{where} does not fit its manifest:", problems))


def _differences(what: str, found: Ports, expected: Ports) -> list[str]:
    common = [n for n in expected if n in found]
    wrong = [n for n in common if found[n][0] != expected[n][0] or not _fits(found[n][1], expected[n][1])]
    return [f"{what} {n} is {_said(found[n])}, expected {_said(expected[n])}" for n in wrong]


def _fits(found: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is the expected one; outputs may leave open what an input does not."""
    return len(found) == len(expected) and all(a == b or a is None for a, b in zip(found, expected, strict=True))


def _said(port: tuple[str, tuple[int | None, ...]]) -> str:
    kind, shape = port
    return f"{kind[7:-1]} ({', '.join('batch' if d is None else str(d) for d in shape)})"


def _expected(name: str, manifest: Manifest, layout: Layout) -> tuple[Ports, Ports]:
    """(inputs, outputs) of the graph ``name``."""
    trained = {t.name for t in manifest.trainables}
    tensors, gradients = _floats(layout.tensors), _floats(layout.sizes([PACKED_GRADIENT]))
    memory = _floats(layout.sizes(layout.slots)) | {STEP: (INT64, ())}
    scalar = (FLOAT, ())
    data = _data(manifest)
    if name == TRAIN:
        return data | tensors | memory | {LR: scalar}, _next(tensors | memory) | {LOSS: scalar, NORM: scalar}
    if name == GRADIENT:
        return data | tensors | gradients | {WEIGHT: scalar}, _next(gradients) | {LOSS: scalar}
    if name == OPTIMIZER:
        own = {n: p for n, p in tensors.items() if n in trained} | memory
        return own | gradients | {LR: scalar}, _next(own) | {NORM: scalar}
    return data | tensors, {LOSS: scalar} | {name: (FLOAT, (None, *row)) for name, row in outputs(manifest).items()}


def _floats(shapes: Mapping[str, Shape]) -> Ports:
    return {name: (FLOAT, shape) for name, shape in shapes.items()}


def _next(inputs: Ports) -> Ports:
    return {name + NEXT: port for name, port in inputs.items()}


def _data(manifest: Manifest) -> Ports:
    found = _features(manifest) or _images(manifest)
    if not has_labels(manifest):
        return found
    if manifest.task is None:
        return found | {LABELS: (INT64, (None,))}
    return found | {t.name: (_TYPES[t.dtype], (None, *t.shape)) for t in manifest.task.targets}


def outputs(manifest: Manifest) -> dict[str, Shape]:
    """What the network answers: names and shapes of a sample."""
    if manifest.task is None:
        return {manifest.output.name: (manifest.output.classes,)}
    return {output.name: output.shape for output in manifest.task.outputs}


def targets(manifest: Manifest, given: Labels, part: slice) -> dict[str, npt.NDArray[Any]]:
    """Labels, or the targets of another task, of some samples of a batch, as step graphs take them."""
    if manifest.task is not None and isinstance(given, Mapping):
        return {t.name: np.ascontiguousarray(given[t.name][part], t.dtype) for t in manifest.task.targets}
    return {LABELS: np.ascontiguousarray(np.asarray(given)[part], np.int64)}


def _images(manifest: Manifest) -> Ports:
    spec = manifest.input
    if spec.in_graph:
        return {spec.name: (UINT8, (None, *spec.raw_shape))}
    return {spec.name: (FLOAT, (None, *spec.shape))}


def _features(manifest: Manifest) -> Ports:
    return {feature.name: (FLOAT, (None, *feature.shape)) for feature in manifest.features}


def has_labels(manifest: Manifest) -> bool:
    """Whether the loss needs labels: that of entropy, for adapting without them, does not."""
    return manifest.needs_labels
