"""Losses appended to a graph of logits; their gradients follow from the ordinary rules.

Logits are (batch, classes) or, for a class per pixel, (batch, classes, ...); labels are the same without the axis of
classes. Every loss is a float32 scalar: the mean over everything but the classes, as `torch.nn.functional` reduces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import name_of


class Loss(Protocol):
    """Appends a loss for class labels: int64 in 0 .. classes - 1, None for a loss that needs none.

    ``smoothing`` moves that share of each label's weight evenly to all classes; 0 where there are no labels.
    """

    def __call__(self, tape: Tape, logits: ir.Value, labels: ir.Value | None, smoothing: float) -> ir.Value: ...


def cross_entropy(tape: Tape, logits: ir.Value, labels: ir.Value, *, smoothing: float = 0.0) -> ir.Value:
    """The mean of -sum(target * log softmax(logits)), targets as of `one_hot`."""
    # the mean below counts classes too: the targets are -classes times too large to make up for it
    classes = class_count(logits)
    targets = _like(logits, _chosen(tape, labels, classes, smoothing, scale=-float(classes)))
    return _mean(tape, tape.op("Mul", _log_softmax(tape, logits), targets, like=logits))


def mean_squared_error(tape: Tape, output: ir.Value, target: ir.Value) -> ir.Value:
    """The mean of (output - target)^2; the target has the output's shape."""
    difference = tape.op("Sub", output, _like(output, target), like=output)
    return _mean(tape, tape.op("Mul", difference, difference, like=output))


def binary_cross_entropy(tape: Tape, logits: ir.Value, target: ir.Value) -> ir.Value:
    """The mean of softplus(x) - x * t, which is -t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)) for any size of x."""
    claimed = tape.op("Mul", logits, _like(logits, target), like=logits)
    return _mean(tape, tape.op("Sub", tape.op("Softplus", logits, like=logits), claimed, like=logits))


def entropy(tape: Tape, logits: ir.Value) -> ir.Value:
    """The mean Shannon entropy, in nats, of softmax(logits)."""
    logs = _log_softmax(tape, logits)
    weighted = tape.op("Mul", tape.op("Exp", logs, like=logits), logs, like=logits)
    return tape.op("Mul", _mean(tape, weighted), -float(class_count(logits)), shape=(), name="loss")


def one_hot(tape: Tape, labels: ir.Value, classes: int, *, smoothing: float = 0.0) -> ir.Value:
    """(batch, ...) -> float targets (batch, classes, ...): smoothing / classes, and 1 - smoothing more at the label."""
    return _chosen(tape, labels, classes, smoothing, scale=1.0)


def class_count(logits: ir.Value) -> int:
    """The size of axis 1. Raises ValueError if it is not a known number."""
    shape = dims(logits)
    if len(shape) < 2 or not isinstance(shape[1], int):
        raise ValueError(f"logits {name_of(logits)!r} have shape {shape}, expected (batch, classes, ...)")
    return shape[1]


def _chosen(tape: Tape, labels: ir.Value, classes: int, smoothing: float, *, scale: float) -> ir.Value:
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label smoothing is {smoothing}, expected a number from 0 to 1")
    share = smoothing / classes
    values = tape.constant(np.array([scale * share, scale * (1.0 - smoothing + share)], np.float32))
    depth = tape.constant(np.array(classes, np.int64))
    batch, *rest = dims(labels)
    shape = (batch, classes, *rest)
    return tape.op("OneHot", labels, depth, values, shape=shape, attributes={"axis": 1}, name="targets")


def _like(output: ir.Value, target: ir.Value) -> ir.Value:
    """The target, whose shape must be the output's: broadcasting would make a wrong loss of another."""
    if dims(target)[1:] != dims(output)[1:] or len(dims(target)) != len(dims(output)):
        raise ValueError(
            f"{name_of(output)!r} has shape {dims(output)}, but its targets {dims(target)}; expected the same, "
            "or labels of that shape without the axis of classes"
        )
    return target


def _log_softmax(tape: Tape, logits: ir.Value) -> ir.Value:
    return tape.op("LogSoftmax", logits, like=logits, attributes={"axis": 1})


def _mean(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("ReduceMean", value, shape=(), attributes={"keepdims": 0}, name="loss")


def _with_targets(loss: Callable[[Tape, ir.Value, ir.Value], ir.Value]) -> Loss:
    def labelled(tape: Tape, logits: ir.Value, labels: ir.Value | None, smoothing: float) -> ir.Value:
        return loss(tape, logits, one_hot(tape, _given(labels), class_count(logits), smoothing=smoothing))

    return labelled


def _cross_entropy(tape: Tape, logits: ir.Value, labels: ir.Value | None, smoothing: float) -> ir.Value:
    return cross_entropy(tape, logits, _given(labels), smoothing=smoothing)


def _entropy(tape: Tape, logits: ir.Value, labels: ir.Value | None, smoothing: float) -> ir.Value:
    if labels is not None or smoothing:
        raise ValueError("the loss 'entropy' has no labels and nothing to smooth; give None and 0")
    return entropy(tape, logits)


def _given(labels: ir.Value | None) -> ir.Value:
    if labels is None:
        raise ValueError("this loss needs labels; only 'entropy' does without")
    return labels


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "mse": _with_targets(mean_squared_error),
    "binary_cross_entropy": _with_targets(binary_cross_entropy),
    "entropy": _entropy,
}
