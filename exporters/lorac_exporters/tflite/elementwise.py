"""Operators that work on each element: arithmetic with broadcasting, comparisons, and functions of one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, need
from lorac_exporters.tflite.arranging import common_layout, operand, reshaped
from lorac_exporters.tflite.lowering import Lowering, Rule, Stored
from lorac_exporters.tflite.network import Option, Tensor

# Where shapes differ, tflite-runtime 2.14.0 without its delegate ends the process: MUL (but for a single number) and
# POW from 5 axes on, SUB, DIV, MAXIMUM and MINIMUM from 6 on.
BROADCAST_RANK = 4
_NUMBER_RANK = 5

_FUSING = {"ADD", "SUB", "MUL", "DIV"}
_BINARY = {
    "Add": "ADD",
    "Sub": "SUB",
    "Mul": "MUL",
    "Div": "DIV",
    "Equal": "EQUAL",
    "Greater": "GREATER",
    "GreaterOrEqual": "GREATER_EQUAL",
    "Less": "LESS",
    "LessOrEqual": "LESS_EQUAL",
    "And": "LOGICAL_AND",
    "Or": "LOGICAL_OR",
}
_UNARY = {
    "Abs": "ABS",
    "Ceil": "CEIL",
    "Cos": "COS",
    "Exp": "EXP",
    "Floor": "FLOOR",
    "Log": "LOG",
    "Neg": "NEG",
    "Not": "LOGICAL_NOT",
    "Round": "ROUND",
    "Sign": "SIGN",
    "Sin": "SIN",
    "Sqrt": "SQRT",
}
_ROOTS = {0.5: "SQRT", -0.5: "RSQRT"}


def no_activation(kind: str) -> dict[str, Option]:
    """The options of an arithmetic operator: no activation folded in yet."""
    return {"fused_activation_function": "NONE"} if kind in _FUSING else {}


def broadcast(lowering: Lowering, node: ir.Node, kind: str, values: Sequence[ir.Value]) -> None:
    """Lower an operator over broadcast operands to ``kind`` and bind the node's output.

    Raises ConversionError if too many axes would have to be broadcast one by one.
    """
    out = node.outputs[0]
    layout = common_layout(lowering, values, len(lowering.dims(out)))
    operands = [operand(lowering, value, layout) for value in values]
    dims = lowering.dims(out)
    shape = tuple(dims[axis] for axis in layout)
    alike = len({t.signature for t in operands}) == 1
    if alike or len(shape) <= BROADCAST_RANK:
        lowering.emit_for(kind, operands, out, layout, options=no_activation(kind))
        return
    full = [(1,) * (len(shape) - len(t.shape)) + t.shape for t in operands]
    groups = _groups(full)
    if len(groups) > BROADCAST_RANK:
        raise lowering.refuse(node, f"it broadcasts {full[0]} with {full[1]}, in more than {BROADCAST_RANK} steps")
    result = _in_groups(lowering, kind, operands, full, groups)
    batch = layout.index(0) if lowering.has_batch(out) else None
    lowering.bind(out, reshaped(lowering, result, shape, batch, name=str(out.name)), layout)


def _groups(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Neighbouring axes in which the same operands have size 1; the batch, 1 everywhere, joins no longer ones."""
    groups = [[0]]
    for axis in range(1, len(shapes[0])):
        if all((sizes[axis] == 1) == (sizes[axis - 1] == 1) for sizes in shapes):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _in_groups(
    lowering: Lowering,
    kind: str,
    operands: Sequence[Tensor],
    full: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
) -> Tensor:
    """The operator on operands whose groups of axes are one axis each."""
    narrow = [tuple(math.prod(sizes[axis] for axis in group) for group in groups) for sizes in full]
    inputs = [
        reshaped(lowering, tensor, shape, tensor.batch_axis) for tensor, shape in zip(operands, narrow, strict=True)
    ]
    batch = next((tensor.batch_axis for tensor in operands if tensor.batch_axis is not None), None)
    name = f"{operands[0].name}_{kind.lower()}"
    shape = np.broadcast_shapes(*narrow)
    return lowering.emit(kind, inputs, shape, name=name, options=no_activation(kind), batch_axis=batch)


class Pointwise:
    """Operators on one stored tensor, each result in its shape; numbers among the operands become constants.

    The last one, by `finish`, takes the name of the node's output and is bound to it.
    """

    def __init__(self, lowering: Lowering, node: ir.Node, found: Stored | None = None) -> None:
        self.lowering, self.node = lowering, node
        self.found = found or lowering.stored(need(node.inputs[0]))
        self.x = self.found.tensor

    def op(self, kind: str, *operands: Tensor | float, options: Mapping[str, Option] | None = None) -> Tensor:
        """Emit ``kind`` on tensors and numbers; the result's shape is that of the node's input."""
        name = f"{self.node.outputs[0].name}_{kind.lower()}"
        inputs = [self.number(part) if isinstance(part, float) else part for part in operands]
        chosen = {**no_activation(kind), **(options or {})}
        shape, batch = self.x.shape, self.x.batch_axis
        return self.lowering.emit(kind, inputs, shape, name=name, options=chosen, batch_axis=batch)

    def finish(self, kind: str, *operands: Tensor | float, options: Mapping[str, Option] | None = None) -> None:
        """Emit the operator that computes the node's output."""
        inputs = [self.number(part) if isinstance(part, float) else part for part in operands]
        chosen = {**no_activation(kind), **(options or {})}
        self.lowering.emit_for(kind, inputs, self.node.outputs[0], self.found.layout, options=chosen)

    def number(self, value: float) -> Tensor:
        """A constant of one element. Raises ConversionError if that cannot be broadcast over the node's input."""
        if len(self.x.shape) > _NUMBER_RANK:
            raise self.lowering.refuse(self.node, f"more than {_NUMBER_RANK} axes: {self.x.shape}")
        return self.lowering.constant(f"{self.node.outputs[0].name}_number", np.array([value], np.float32))


def alias(lowering: Lowering, node: ir.Node) -> None:
    """The output is the first input: no operator."""
    found = lowering.stored(need(node.inputs[0]))
    lowering.bind(node.outputs[0], found.tensor, found.layout)


def unary(kind: str, options: Mapping[str, Option] | None = None) -> Rule:
    """The rule of an operator that is ``kind`` in TFLite, element for element."""

    def rule(lowering: Lowering, node: ir.Node) -> None:
        work = Pointwise(lowering, node)
        work.finish(kind, work.x, options=options)

    return rule


def _binary(kind: str) -> Rule:
    return lambda lowering, node: broadcast(lowering, node, kind, [need(value) for value in node.inputs])


def _variadic(kind: str) -> Rule:
    """Two at a time; ONNX allows any number of operands."""

    def rule(lowering: Lowering, node: ir.Node) -> None:
        values = [need(value) for value in node.inputs]
        if len(values) == 1:
            alias(lowering, node)
        elif len(values) == 2:
            broadcast(lowering, node, kind, values)
        else:
            _chain(lowering, node, kind, values)

    return rule


def _chain(lowering: Lowering, node: ir.Node, kind: str, values: Sequence[ir.Value]) -> None:
    work, operands = _alike(lowering, node, values)
    total = operands[0]
    for tensor in operands[1:-1]:
        total = work.op(kind, total, tensor)
    work.finish(kind, total, operands[-1])


def _mean(lowering: Lowering, node: ir.Node) -> None:
    """The sum, times one over the number of operands."""
    work, operands = _alike(lowering, node, [need(value) for value in node.inputs])
    total = operands[0]
    for tensor in operands[1:]:
        total = work.op("ADD", total, tensor)
    work.finish("MUL", total, 1.0 / len(operands))


def _alike(lowering: Lowering, node: ir.Node, values: Sequence[ir.Value]) -> tuple[Pointwise, list[Tensor]]:
    """Operands in one order of axes. Raises ConversionError if their shapes differ."""
    layout = common_layout(lowering, values, len(lowering.dims(node.outputs[0])))
    operands = [operand(lowering, value, layout) for value in values]
    if len({tensor.signature for tensor in operands}) > 1:
        raise lowering.refuse(node, "operands of different shapes: write them in pairs, as Add, Max or Min")
    return Pointwise(lowering, node, Stored(operands[0], layout)), operands


def _power(lowering: Lowering, node: ir.Node) -> None:
    """The usual exponents without POW, which is slow and inexact for a negative base."""
    values = [need(value) for value in node.inputs]
    exponent = array(values[1])
    if exponent is None or exponent.size != 1 or array(values[0]) is not None:
        return broadcast(lowering, node, "POW", values)
    work, power = Pointwise(lowering, node), float(exponent.reshape(()))
    if len(lowering.dims(node.outputs[0])) != len(work.x.shape):
        raise lowering.refuse(node, f"an exponent of more axes ({exponent.ndim}) than the base")
    if power == 1.0:
        return alias(lowering, node)
    if power == 2.0:
        return work.finish("MUL", work.x, work.x)
    if power == 3.0:
        return work.finish("MUL", work.op("MUL", work.x, work.x), work.x)
    if power in _ROOTS:
        return work.finish(_ROOTS[power], work.x)
    if power == -1.0:
        return work.finish("DIV", 1.0, work.x)
    return broadcast(lowering, node, "POW", values)


def _reciprocal(lowering: Lowering, node: ir.Node) -> None:
    work = Pointwise(lowering, node)
    work.finish("DIV", 1.0, work.x)


RULES: dict[str, Rule] = {
    **{name: _binary(kind) for name, kind in _BINARY.items()},
    **{name: unary(kind) for name, kind in _UNARY.items()},
    "Max": _variadic("MAXIMUM"),
    "Mean": _mean,
    "Min": _variadic("MINIMUM"),
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "Sum": _variadic("ADD"),
    "Where": _binary("SELECT_V2"),
}
