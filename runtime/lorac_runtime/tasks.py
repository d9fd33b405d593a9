"""What an artifact's network answers when it does not answer with a class, and what its loss compares answers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import ArtifactError

CLASSIFICATION, SEGMENTATION, REGRESSION, CUSTOM = TASKS = ("classification", "segmentation", "regression", "custom")
LABELS, VALUES = "labels", "targets"  # what the built-in losses compare with
OWN_LOSS = "graph"  # the loss of the task `CUSTOM`: an ONNX graph that the artifact's maker gave
TARGET_DTYPES = ("int64", "float32")
IGNORED = 255  # the label of pixels that count neither in the loss nor in figures, as data sets have it

# The first of each is its default.
LOSSES_OF: dict[str, tuple[str, ...]] = {
    CLASSIFICATION: ("cross_entropy", "focal", "distillation", "mse", "binary_cross_entropy", "entropy"),
    SEGMENTATION: ("cross_entropy", "focal", "distillation", "entropy"),
    REGRESSION: ("l1", "mse"),
    CUSTOM: (OWN_LOSS,),
}
BY_LABELLED_PIXEL = ("cross_entropy", "focal")  # means over the pixels with a label; other losses are over samples

Array = npt.NDArray[Any]
Targets = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Target:
    """An array of local data that a loss compares answers with: (N, *shape), ``dtype`` one of `TARGET_DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the network: float32 (batch, *shape)."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network does that is no classifier. ``kind`` is one of `TASKS` but the first.

    A segmentation network has one output, scores (classes, height, width), and the target ``labels`` (height, width);
    a regression network one output and ``targets`` of its shape; one with a loss of its own (custom) any number of
    both. ``ignore_index`` is the label of pixels that do not count, of segmentation only.

    >>> mask = Target("labels", "int64", (8, 8))
    >>> Task("segmentation", (Output("out", (3, 8, 8)),), (mask,), IGNORED).classes
    3
    """

    kind: str
    outputs: tuple[Output, ...]
    targets: tuple[Target, ...]
    ignore_index: int | None = None

    @property
    def classes(self) -> int:
        """How many classes its scores are of; 0 where they are of none."""
        return self.outputs[0].shape[0] if self.kind == SEGMENTATION else 0


def task_problems(task: Task, loss: str) -> list[str]:
    """What contradicts itself in a task, and in a ``loss`` for it, a line each.

    >>> task_problems(Task("regression", (Output("y", (1,)),), (Target("targets", "float32", (2,)),)), "l1")
    ['task.targets: targets is float32 (2), expected targets is float32 (1), as the output y']
    """
    if task.kind not in TASKS[1:]:
        return [f"task.kind: {task.kind!r} is not one of {', '.join(TASKS[1:])}"]
    problems = [] if task.outputs else ["task.outputs: there is none"]
    problems += [f"task.{what}: {name!r} is named twice" for what, name in _doubles(task)]
    sizes = [(f"task.outputs.{o.name}", o.shape) for o in task.outputs]
    sizes += [(f"task.targets.{t.name}", t.shape) for t in task.targets]
    problems += [f"{where}: shape {shape} must be positive" for where, shape in sizes if any(d < 1 for d in shape)]
    odd = [t for t in task.targets if t.dtype not in TARGET_DTYPES]
    problems += [f"task.targets.{t.name}: {t.dtype!r} is not one of {', '.join(TARGET_DTYPES)}" for t in odd]
    if task.ignore_index is not None and task.kind != SEGMENTATION:
        problems.append(f"task.ignore_index: {task.ignore_index}, and the task {task.kind} has no labels to ignore")
    if loss not in LOSSES_OF[task.kind]:
        problems.append(
            f"training.loss: {loss!r} is not one of those of {task.kind}: {', '.join(LOSSES_OF[task.kind])}"
        )
    return problems or _shape_problems(task)


def require_classifier(artifact: Path, task: Task | None, why: str, advice: str) -> None:
    """Raise ArtifactError for an artifact of another task, where only a classifier makes sense."""
    if task is not None:
        raise ArtifactError(f"{artifact}: the task is {task.kind}, and {why}: {advice}")


def built_in_targets(kind: str, output: Output) -> tuple[Target, ...]:
    """What the built-in losses of a task compare its output with."""
    if kind == SEGMENTATION:
        return (Target(LABELS, "int64", output.shape[1:]),)
    return (Target(VALUES, "float32", output.shape),)


def _shape_problems(task: Task) -> list[str]:
    if task.kind == CUSTOM:
        return []
    if len(task.outputs) != 1:
        return [f"task.outputs: {len(task.outputs)}, the task {task.kind} has one"]
    output = task.outputs[0]
    if task.kind == SEGMENTATION and len(output.shape) < 2:
        return [f"task.outputs.{output.name}: shape {output.shape}, expected (classes, height, width)"]
    expected = built_in_targets(task.kind, output)
    if task.targets == expected:
        return []
    given = ", ".join(map(_said, task.targets)) or "none"
    return [f"task.targets: {given}, expected {_said(expected[0])}, as the output {output.name}"]


def _said(target: Target) -> str:
    return f"{target.name} is {target.dtype} ({', '.join(map(str, target.shape))})"


def _doubles(task: Task) -> list[tuple[str, str]]:
    found = {"outputs": [o.name for o in task.outputs], "targets": [t.name for t in task.targets]}
    return [(what, name) for what, names in found.items() for name in sorted(set(names)) if names.count(name) > 1]


def weight_of(task: Task | None, loss: str, targets: Targets | Array | None, part: slice, count: int) -> float:
    """How much the samples ``part`` of a batch of ``count`` weigh in a mean loss: their pixels with a label, or 1 each.

    So the loss of a batch is the mean of those of its parts, weighted with this.
    """
    if task is None or task.kind != SEGMENTATION or loss not in BY_LABELLED_PIXEL or not isinstance(targets, Mapping):
        return float(len(range(*part.indices(count))))
    labels = targets[LABELS][part]
    return float(labels.size if task.ignore_index is None else np.count_nonzero(labels != task.ignore_index))
