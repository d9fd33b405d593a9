"""Reverse mode over an ONNX graph: the gradient of a scalar with respect to any of its tensors, as more nodes.

The nodes of the forward graph are walked backwards; `lorac_exporters.gradients.rules.RULES` says for each operator
how the gradients of its inputs follow from those of its outputs. Nothing is written for tensors that no wanted
gradient passes through, so no work is done below the lowest of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.phases import add_phases, interleave
from lorac_exporters.gradients.rule import Gradient, Phased, Rule, Site
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import describe, name_of, need
from lorac_runtime.errors import ConversionError, listed

_ONE = np.float32(1)
Parts = dict[ir.Value, list[Gradient]]


def differentiate(
    tape: Tape,
    loss: ir.Value,
    wanted: Iterable[ir.Value],
    *,
    seed: ir.Value | None = None,
    rules: Mapping[str, Rule] = RULES,
) -> list[ir.Value]:
    """Append the gradient of the scalar ``loss`` to the graph of ``tape``; returns a gradient for each wanted value.

    The gradients have the shapes of the values. With ``seed``, of the shape of ``loss``, which then may be any tensor,
    they are those of sum(loss * seed).

    Raises ConversionError naming every node on the way that has no rule, or every wanted value that the loss does not
    depend on.
    """
    values = list(wanted)
    nodes = path(tape.graph, loss, values)
    _require_rules(nodes, rules)
    gradients: Parts = {loss: [tape.constant(_ONE) if seed is None else seed]}
    changing = {*values, *(output for node in nodes for output in node.outputs)}
    for node in reversed(nodes):
        grads = tuple(_settled(tape, gradients, output) for output in node.outputs)
        if any(grad is not None for grad in grads):
            site = Site(node, grads, tuple(value in changing for value in node.inputs))
            _collect(gradients, site, rules[node.op_type](tape, site))
    return _found(tape, gradients, values)


def path(graph: ir.Graph, target: ir.Value, sources: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that lie between ``sources`` and ``target``, in the order of the graph.

    Integers and truth values (sizes, masks) end a path.
    """
    changing = set(sources)
    forward = []
    for node in graph:
        if any(value in changing for value in node.inputs):
            changing |= {output for output in node.outputs if _is_float(output)}
            forward.append(node)
    reaching = {target}
    found = []
    for node in reversed(forward):
        if any(output in reaching and output in changing for output in node.outputs):
            reaching |= {value for value in node.inputs if value is not None}
            found.append(node)
    return found[::-1]


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _require_rules(nodes: Iterable[ir.Node], rules: Mapping[str, Rule]) -> None:
    missing = [describe(node) for node in nodes if node.domain != "" or node.op_type not in rules]
    if missing:
        raise ConversionError(listed("these nodes have no gradient rule; train fewer layers or replace them:", missing))


def _settled(tape: Tape, gradients: Parts, value: ir.Value) -> ir.Value | None:
    """The sum of the gradients that reach a value by several ways; it takes their place."""
    parts = gradients.get(value)
    if not parts:
        return None
    whole = [part for part in parts if isinstance(part, ir.Value)]
    total = _sum(tape, value, whole + _interleaved(tape, [part for part in parts if isinstance(part, Phased)]))
    gradients[value] = [total]
    return total


def _sum(tape: Tape, like: ir.Value, parts: list[ir.Value]) -> ir.Value:
    return functools.reduce(lambda one, other: tape.op("Add", one, other, like=like, name="grad_sum"), parts)


def _interleaved(tape: Tape, parts: list[Phased]) -> list[ir.Value]:
    """Whole gradients: those with the same strides are summed before they are interleaved."""
    alike: dict[tuple[int, ...], list[Phased]] = {}
    for part in parts:
        alike.setdefault(part.strides, []).append(part)
    sums = (functools.reduce(lambda one, other: add_phases(tape, one, other), same) for same in alike.values())
    return [interleave(tape, phased) for phased in sums]


def _collect(gradients: Parts, site: Site, found: Iterable[Gradient | None]) -> None:
    for value, needed, grad in zip(site.node.inputs, site.needs, found, strict=True):
        if value is not None and needed and grad is not None:
            gradients.setdefault(value, []).append(grad)


def _found(tape: Tape, gradients: Parts, values: list[ir.Value]) -> list[ir.Value]:
    missing = [name_of(value) for value in values if not gradients.get(value)]
    if missing:
        raise ConversionError(listed("no gradient reaches these tensors: the loss does not depend on them:", missing))
    return [need(_settled(tape, gradients, value)) for value in values]
