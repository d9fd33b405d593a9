"""Fully connected layers of a graph: which there are, and which of them take an adapter.

An adapter wants ``y = x @ weight.T + bias``, the weight (c_out, c_in) as nn.Linear stores it: a Gemm with transB = 1.
What is written otherwise can train in full, but stays without adapter, and says why.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import (
    array,
    convolutions,
    float_attribute,
    input_at,
    int_attribute,
    layer_name,
    name_of,
    need,
    nodes_of,
)
from lorac_exporters.plan import Layer
from lorac_runtime.manifest import Trainable

Floats = npt.NDArray[np.float32]


def linear_layers(graph: ir.Graph, values: Mapping[str, Floats], heads: Container[str]) -> tuple[Layer, ...]:
    """Every Gemm and MatMul with a stored weight, in the order of the graph; a shared weight is one layer.

    ``values`` are the float initializers by name; ``heads`` are weights that are left out.
    """
    found: dict[str, Layer] = {}
    for node, weight in _products(graph, values):
        if weight not in heads and weight not in found:
            found[weight] = _layer(node, weight, values)
    return tuple(found.values())


def linear_tensors(graph: ir.Graph, values: Mapping[str, Floats], heads: Container[str]) -> tuple[Trainable, ...]:
    """Weights and biases of fully connected layers before the head, in the order of the graph."""
    found: dict[str, Trainable] = {}
    for node, weight in _products(graph, values):
        if weight not in heads:
            names = [name_of(v) for v in node.inputs if v is not None and v.name in values]
            for name, role in zip(names, ("weight", "bias"), strict=False):  # a bias may be absent
                found.setdefault(name, Trainable(name, values[name].shape, role))
    return tuple(found.values())


def linear_obstacle(node: ir.Node) -> str | None:
    """Why a Gemm or MatMul takes no adapter; None if it does.

    >>> linear_obstacle(ir.node("MatMul", [ir.val("x"), ir.val("w")]))
    'its weight is not the right factor of the product'
    """
    weight = need(node.inputs[1])
    if array(weight) is None:
        return "its weight is not the right factor of the product"
    if len(weight.uses()) > 1:
        return "its weight is shared with another layer"
    if int_attribute(node, "transA", 0):
        return "its input is transposed (transA = 1)"
    factors = {name: float_attribute(node, name, 1.0) for name in ("alpha", "beta")}
    scaled = [f"{name} = {factor:g}" for name, factor in factors.items() if factor != 1.0]
    if scaled:
        return f"it scales its sum ({', '.join(scaled)}), an adapter needs a plain product"
    if node.op_type == "MatMul" or not int_attribute(node, "transB", 0):
        return "its weight is stored as (in, out), an adapter needs (out, in) as nn.Linear stores it"
    return None


def _products(graph: ir.Graph, values: Mapping[str, Floats]) -> list[tuple[ir.Node, str]]:
    """(node, name of its weight) of each Gemm and MatMul that has one; the bias of a Gemm is none."""
    found = []
    for node in nodes_of(graph, "Gemm", "MatMul"):
        weights = [name_of(v) for v in node.inputs[:2] if v is not None and v.name in values]
        if weights:
            found.append((node, weights[-1]))
    return found


def _layer(node: ir.Node, weight: str, values: Mapping[str, Floats]) -> Layer:
    return Layer(
        name=layer_name(weight),
        weight=weight,
        bias=_own_bias(node, values, values[weight].shape[0]),
        shape=values[weight].shape,
        obstacle=linear_obstacle(node),
        size_in=(),
        size_out=(),
    )


def _own_bias(node: ir.Node, values: Mapping[str, Floats], c_out: int) -> str | None:
    """A stored bias (c_out,) that nothing else reads."""
    bias = input_at(node, 2)
    if bias is None or len(bias.uses()) != 1:
        return None
    name = name_of(bias)
    return name if name in values and values[name].shape == (c_out,) else None


def weighted_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """The nodes that take an adapter, by the name of their weight: convolutions and plain fully connected layers."""
    linear = [node for node in nodes_of(graph, "Gemm") if array(node.inputs[1]) is not None]
    return {name_of(node.inputs[1]): node for node in (*convolutions(graph), *linear)}
