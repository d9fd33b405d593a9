"""Losses of labels that may be missing, of answers that a base gave, and of numbers: focal, distillation, L1.

Logits and labels are those of `lorac_exporters.gradients.losses`. Positions whose label is ``ignore`` have no label;
None: all have one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.losses import LOSSES, class_count, mean_squared_error
from lorac_exporters.gradients.tape import Dims, Tape, dims
from lorac_exporters.graph_tools import need
from lorac_runtime.tasks import REGRESSION
from lorac_runtime.training_defaults import TrainingDefaults


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a built-in loss compares: the network's output, its targets, and what the frozen base answers.

    ``target``: labels, or values of the output's shape; None for a loss that needs none. ``kind`` is the task.
    """

    kind: str
    output: ir.Value
    target: ir.Value | None
    base: ir.Value | None = None
    ignore: int | None = None


def built_in_loss(tape: Tape, given: Compared, settings: TrainingDefaults) -> ir.Value:
    """The loss that ``settings`` name, a float32 scalar."""
    output, target = given.output, given.target
    if given.kind == REGRESSION:
        loss = l1 if settings.loss == "l1" else mean_squared_error
        return loss(tape, output, need(target))
    if settings.loss == "focal":
        return focal(tape, output, need(target), gamma=settings.focal_gamma, ignore=given.ignore)
    if settings.loss == "distillation":
        weight, temperature = settings.distillation_weight, settings.temperature
        base = need(given.base)
        return distillation(
            tape, output, base, need(target), weight=weight, temperature=temperature, ignore=given.ignore
        )
    if settings.loss == "cross_entropy" and given.ignore is not None:
        return labelled_cross_entropy(
            tape, output, need(target), ignore=given.ignore, smoothing=settings.label_smoothing
        )
    return LOSSES[settings.loss](tape, output, target, settings.label_smoothing)


def l1(tape: Tape, output: ir.Value, target: ir.Value) -> ir.Value:
    """The mean of |output - target|."""
    difference = tape.op("Sub", output, target, like=output)
    return _scalar(tape, "ReduceMean", tape.op("Abs", difference, like=output))


def labelled_cross_entropy(
    tape: Tape, logits: ir.Value, labels: ir.Value, *, ignore: int, smoothing: float = 0.0
) -> ir.Value:
    """The mean cross-entropy over the positions with a label, as torch's ``ignore_index``; 0 where there is none."""
    targets = label_targets(tape, labels, class_count(logits), ignore=ignore, smoothing=smoothing, scale=-1.0)
    logs = tape.op("LogSoftmax", logits, like=logits, attributes={"axis": 1})
    total = _scalar(tape, "ReduceSum", tape.op("Mul", logs, targets, like=logits))
    return tape.op("Div", total, label_count(tape, labels, ignore), shape=(), name="loss")


def focal(tape: Tape, logits: ir.Value, labels: ir.Value, *, gamma: float, ignore: int | None = None) -> ir.Value:
    """The mean over the positions with a label of -(1 - p)^gamma * log p, p being the label's softmax."""
    classes = class_count(logits)
    chosen = label_targets(tape, labels, classes, ignore=ignore, scale=1.0)
    logs = tape.op("LogSoftmax", logits, like=logits, attributes={"axis": 1})
    attributes = {"keepdims": 0}
    picked = tape.op("Mul", logs, chosen, like=logits)
    own = tape.op("ReduceSum", picked, tape.ints(1), shape=dims(labels), attributes=attributes)
    doubt = tape.op("Sub", 1.0, tape.op("Exp", own, like=own), like=own)
    weight = tape.op("Pow", doubt, tape.constant(np.float32(gamma)), like=own)
    total = _scalar(tape, "ReduceSum", tape.op("Mul", weight, own, like=own))
    return tape.op("Neg", tape.op("Div", total, label_count(tape, labels, ignore), shape=()), shape=(), name="loss")


def distillation(
    tape: Tape,
    logits: ir.Value,
    base: ir.Value,
    labels: ir.Value,
    *,
    weight: float,
    temperature: float,
    ignore: int | None = None,
) -> ir.Value:
    """(1 - weight) * cross-entropy + weight * temperature^2 * KL(base || logits), softened by the temperature.

    Both terms are means over all positions; one without a label adds nothing to the first (Li and Hoiem, Learning
    without Forgetting, arXiv 1606.09282; the square as in Hinton et al., arXiv 1503.02531, section 2).
    """
    classes = class_count(logits)
    targets = label_targets(tape, labels, classes, ignore=ignore, scale=-classes * (1.0 - weight))
    logs = tape.op("LogSoftmax", logits, like=logits, attributes={"axis": 1})
    first = tape.op("Mul", logs, targets, like=logits)
    soft, known = (_softened(tape, value, temperature) for value in (logits, base))
    surprise = tape.op("Sub", known, soft, like=logits)
    divergence = tape.op("Mul", tape.op("Exp", known, like=logits), surprise, like=logits)
    second = tape.op("Mul", divergence, classes * weight * temperature**2, like=logits)
    return _scalar(tape, "ReduceMean", tape.op("Add", first, second, like=logits))


def label_targets(
    tape: Tape, labels: ir.Value, classes: int, *, ignore: int | None, smoothing: float = 0.0, scale: float
) -> ir.Value:
    """(batch, ...) -> float (batch, classes, ...): ``scale`` times the one-hot label, zeros where there is none."""
    share = smoothing / classes
    values = tape.constant(np.array([scale * share, scale * (1.0 - smoothing + share)], np.float32))
    given = labels if ignore is None else _out_of_range(tape, labels, classes, ignore)
    batch, *rest = dims(labels)
    shape: Dims = (batch, classes, *rest)
    depth = tape.constant(np.array(classes, np.int64))
    found = tape.op("OneHot", given, depth, values, shape=shape, attributes={"axis": 1}, name="targets")
    if ignore is None or not smoothing:
        return found
    mask = tape.op("Unsqueeze", _labelled(tape, labels, ignore), tape.ints(1), shape=(batch, 1, *rest))
    return tape.op("Mul", found, mask, like=found)


def label_count(tape: Tape, labels: ir.Value, ignore: int | None) -> ir.Value:
    """How many positions have a label, float32 (), 1 at least."""
    if ignore is None:
        size = tape.op("Size", labels, shape=(), dtype=ir.DataType.INT64)
        return tape.op("Cast", size, shape=(), attributes={"to": int(ir.DataType.FLOAT)})
    count = _scalar(tape, "ReduceSum", _labelled(tape, labels, ignore))
    return tape.op("Max", count, 1.0, shape=())


def _labelled(tape: Tape, labels: ir.Value, ignore: int) -> ir.Value:
    """1.0 where there is a label."""
    missing = _missing(tape, labels, ignore)
    kept = tape.op("Not", missing, like=labels, dtype=ir.DataType.BOOL)
    return tape.op("Cast", kept, like=labels, dtype=ir.DataType.FLOAT, attributes={"to": int(ir.DataType.FLOAT)})


def _out_of_range(tape: Tape, labels: ir.Value, classes: int, ignore: int) -> ir.Value:
    """Labels with ``classes`` in place of ``ignore``: a number that OneHot has no place for, so it writes nothing."""
    beyond = tape.constant(np.array(classes, np.int64))
    return tape.op("Where", _missing(tape, labels, ignore), beyond, labels, like=labels)


def _missing(tape: Tape, labels: ir.Value, ignore: int) -> ir.Value:
    number = tape.constant(np.array(ignore, np.int64))
    return tape.op("Equal", labels, number, like=labels, dtype=ir.DataType.BOOL)


def _softened(tape: Tape, logits: ir.Value, temperature: float) -> ir.Value:
    cooled = logits if temperature == 1 else tape.op("Mul", logits, 1.0 / temperature, like=logits)
    return tape.op("LogSoftmax", cooled, like=logits, attributes={"axis": 1})


def _scalar(tape: Tape, reduction: str, value: ir.Value) -> ir.Value:
    return tape.op(reduction, value, shape=(), attributes={"keepdims": 0}, name="loss")
