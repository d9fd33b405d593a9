"""ONNX's own losses, as exporters write them, written out in operators that have gradients and that all engines run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.losses import class_count
from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.gradients.task_losses import label_targets
from lorac_exporters.graph_tools import int_attribute, need, text_attribute

_LEAST = 1e-12  # a mean over nothing is 0
Written = Callable[[Tape, ir.Node, Sequence["ir.Value | None"]], Sequence[ir.Value]]


def softmax_cross_entropy(tape: Tape, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
    """(loss, log-probabilities)."""
    scores = need(inputs[0])
    logs = tape.op("LogSoftmax", scores, like=scores, attributes={"axis": 1})
    return [*negative_log_likelihood(tape, node, [logs, *inputs[1:]]), logs]


def negative_log_likelihood(tape: Tape, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
    """Its loss: ``reduction`` mean, sum or none; ``ignore_index`` and weights of classes as PyTorch has them."""
    logs, labels = need(inputs[0]), _as_int64(tape, need(inputs[1]))
    weights = inputs[2] if len(inputs) > 2 else None
    ignore = int_attribute(node, "ignore_index", 0) if "ignore_index" in node.attributes else None
    counted = label_targets(tape, labels, class_count(logs), ignore=ignore, scale=1.0)
    if weights is not None:
        column = (1, class_count(logs), *[1] * (len(dims(logs)) - 2))
        counted = tape.op("Mul", counted, tape.op("Reshape", weights, tape.ints(*column), shape=column), like=logs)
    losses = tape.op(
        "Neg", _summed(tape, tape.op("Mul", logs, counted, like=logs), labels), like=labels, dtype=logs.dtype
    )
    reduction = text_attribute(node, "reduction", "mean")
    if reduction == "none":
        return [losses]
    total = tape.op("ReduceSum", losses, shape=(), attributes={"keepdims": 0})
    if reduction == "sum":
        return [total]
    count = tape.op("ReduceSum", counted, shape=(), attributes={"keepdims": 0})
    return [tape.op("Div", total, tape.op("Max", count, _LEAST, shape=()), shape=())]


def _summed(tape: Tape, value: ir.Value, labels: ir.Value) -> ir.Value:
    """Over the classes."""
    return tape.op("ReduceSum", value, tape.ints(1), shape=dims(labels), attributes={"keepdims": 0})


def _as_int64(tape: Tape, labels: ir.Value) -> ir.Value:
    if labels.dtype == ir.DataType.INT64:
        return labels
    return tape.op("Cast", labels, like=labels, dtype=ir.DataType.INT64, attributes={"to": int(ir.DataType.INT64)})


WRITTEN_OUT: dict[str, Written] = {
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
}
