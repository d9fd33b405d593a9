"""Rewrites of a graph before it is lowered: several nodes that are one operator in TFLite become that one.

Exporters write GELU and HardSwish out; a product may come in any order, so its factors are compared as a set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import (
    Array,
    array,
    bypass,
    float_attribute,
    int_attribute,
    name_of,
    need,
    nodes_of,
    producer,
    remove_unused,
    replace_node,
    static_dims,
)
from lorac_exporters.shapes import trace
from lorac_exporters.tflite.padding import merge_pads

_SIZES = (2, 3)  # batch sizes at which computed indices are looked at


def join_gelu(model: ir.Model) -> None:
    """x / 2 * (1 + erf(x / sqrt(2))) -> Gelu."""
    for erf in nodes_of(model.graph, "Erf"):
        source = _scaled_by(erf.inputs[0], 1 / math.sqrt(2))
        raised = _sole_user(erf.outputs[0])
        if source is None or raised is None or raised.op_type != "Add" or _other(raised, erf.outputs[0]) != 1.0:
            continue
        _join(raised.outputs[0], source, 0.5, "Gelu")
    remove_unused(model)


def join_hard_swish(model: ir.Model) -> None:
    """x * HardSigmoid(x), and x * clip(x + 3, 0, 6) / 6 -> HardSwish."""
    for node in nodes_of(model.graph, "HardSigmoid"):
        slope, offset = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
        if math.isclose(slope, 1 / 6, rel_tol=1e-6) and offset == 0.5:
            _join(node.outputs[0], need(node.inputs[0]), 1.0, "HardSwish")
    for node in nodes_of(model.graph, "Clip"):
        shifted = need(node.inputs[0]).producer()
        if shifted is None or shifted.op_type != "Add" or [_number(v) for v in node.inputs[1:]] != [0.0, 6.0]:
            continue
        for value, number in _pairs(shifted):
            if number == 3.0:
                _join(node.outputs[0], value, 1 / 6, "HardSwish")
    remove_unused(model)


def _join(part: ir.Value, source: ir.Value, factor: float, op_type: str) -> None:
    """Replace the product part * source * factor by one operator on ``source``."""
    top = part
    while (user := _sole_user(top)) is not None and user.op_type in ("Mul", "Div"):
        top = user.outputs[0]
        factors = list(_factors(top, {part, source}))
        scale = math.prod(f for f in factors if isinstance(f, float))
        values = [f for f in factors if not isinstance(f, float)]
        if len(values) == 2 and set(values) == {part, source} and math.isclose(scale, factor, rel_tol=1e-6):
            node = ir.node(op_type, [source], name=user.name)
            node.outputs[0].name = f"{name_of(top)}_{op_type.lower()}"
            replace_node(user, [node], node.outputs[0])
            return


def _factors(value: ir.Value, leaves: set[ir.Value]) -> Iterator[ir.Value | float]:
    """What a value is the product of: constants as numbers, other values as they are."""
    number, node = _number(value), value.producer()
    divisor = None if node is None or node.op_type != "Div" else _number(node.inputs[1])
    if number is not None:
        yield number
    elif value in leaves or node is None:
        yield value
    elif node.op_type == "Mul":
        yield from (f for part in node.inputs for f in _factors(need(part), leaves))
    elif divisor:
        yield from _factors(need(node.inputs[0]), leaves)
        yield 1 / divisor
    else:
        yield value


def _scaled_by(value: ir.Value | None, factor: float) -> ir.Value | None:
    """x, if ``value`` is x * factor; else None. x may be a product itself."""
    found, scale = need(value), 1.0
    while not math.isclose(scale, factor, rel_tol=1e-6):
        step = _without_number(found)
        if step is None:
            return None
        found, scale = step[0], scale * step[1]
    return found


def _without_number(product: ir.Value) -> tuple[ir.Value, float] | None:
    """(x, number) of x * number or x / (1 / number); None for everything else."""
    node = product.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    if node.op_type == "Mul":
        return next(((value, number) for value, number in _pairs(node) if number is not None), None)
    divisor = _number(node.inputs[1])
    return None if divisor is None or divisor == 0 else (need(node.inputs[0]), 1 / divisor)


def _pairs(node: ir.Node) -> Iterator[tuple[ir.Value, float | None]]:
    """(operand, the number that the other operand is) of a node with two operands."""
    first, second = need(node.inputs[0]), need(node.inputs[1])
    yield first, _number(second)
    yield second, _number(first)


def _other(node: ir.Node, value: ir.Value) -> float | None:
    return next((number for operand, number in _pairs(node) if operand is value), None)


def _number(value: ir.Value | None) -> float | None:
    """The number of a constant of one element; None for everything else."""
    numbers = array(value)
    return None if numbers is None or numbers.size != 1 else float(numbers.reshape(()))


def _sole_user(value: ir.Value) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def drop_idle_gathers(model: ir.Model) -> None:
    """Remove a Gather that reads every number of a flattened tensor in its own order.

    PyTorch exports a change of strides (ConvNeXt's pooling) as a Gather with indices computed from the batch size.
    """
    for node in [node for node in nodes_of(model.graph, "Gather") if _reads_flattened(node)]:
        found = _numbers_at_each_size(model, name_of(node.inputs[1]))
        if all(indices is not None and np.array_equal(indices.ravel(), np.arange(indices.size)) for indices in found):
            node.replace_input_with(0, need(producer(need(node.inputs[0])).inputs[0]))
            bypass(node)
            remove_unused(model)


def _numbers_at_each_size(model: ir.Model, name: str) -> list[Array | None]:
    """What a value is at each of the batch sizes `_SIZES`; None where that depends on more."""
    twin = model.clone()
    twin.graph.outputs[:] = [output for node in twin.graph for output in node.outputs if output.name == name]
    remove_unused(twin)
    return [trace(twin, size).constants.get(name) for size in _SIZES]


def _reads_flattened(node: ir.Node) -> bool:
    """Whether a Gather with computed indices reads Reshape(x, [-1]) and gives x's shape back."""
    flattening = need(node.inputs[0]).producer()
    if flattening is None or flattening.op_type != "Reshape" or int_attribute(node, "axis", 0) != 0:
        return False
    flat = len(static_dims(node.inputs[0]) or ()) == 1 and array(node.inputs[1]) is None
    return flat and static_dims(flattening.inputs[0]) == static_dims(node.outputs[0])


PATTERNS: tuple[Callable[[ir.Model], None], ...] = (drop_idle_gathers, join_hard_swish, join_gelu, merge_pads)
