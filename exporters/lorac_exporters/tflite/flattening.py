"""Flatten in front of a fully connected layer: the layer's weight is reordered, not the feature map.

A feature map lies channels-last, so its numbers come out in another order than ONNX's. Where every layer that reads
the flattened value has a constant weight, its columns are stored in that order.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from lorac_exporters.graph_tools import array, consumers, int_attribute, static_dims
from lorac_exporters.tflite.lowering import Layout, Lowering, plain

# Operators on each element, whatever their order.
_ELEMENTWISE = frozenset(
    {
        "Abs",
        "Clip",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Mish",
        "Neg",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Tanh",
    }
)


def is_flattening(node: ir.Node) -> bool:
    """Whether a node makes one vector of each sample of a feature map."""
    before, after = static_dims(node.inputs[0]), static_dims(node.outputs[0])
    if node.op_type not in ("Flatten", "Reshape") or before is None or after is None or None in before[1:]:
        return False
    joined = math.prod(size or 1 for size in before[1:])
    return len(before) > 2 and len(after) == 2 and after == (before[0], joined)


def keeps_stored_order(node: ir.Node) -> bool:
    """Whether only fully connected layers with constant weights read a flattened value, maybe after activations."""
    return is_flattening(node) and _is_read_by_layers(node.outputs[0])


def flattened_from(lowering: Lowering, value: ir.Value | None) -> tuple[tuple[int, ...], Layout] | None:
    """The ONNX shape of the feature map that a vector was flattened from, and in which order it lies.

    None if the vector is in ONNX's own order.
    """
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _ELEMENTWISE and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or not keeps_stored_order(node):
        return None
    return lowering.dims(node.inputs[0]), stored_order(lowering, node)


def stored_order(lowering: Lowering, node: ir.Node) -> Layout:
    """The layout in which the feature map is flattened: its own if the batch comes first."""
    layout = lowering.stored(node.inputs[0]).layout
    return layout if layout[0] == 0 else plain(len(layout))


def _is_read_by_layers(value: ir.Value) -> bool:
    uses = list(consumers(value))
    if not uses or value.is_graph_output():
        return False
    return all(
        _is_layer(node, index) or (node.op_type in _ELEMENTWISE and index == 0 and _is_read_by_layers(node.outputs[0]))
        for node, index in uses
    )


def _is_layer(node: ir.Node, index: int) -> bool:
    if node.op_type not in ("Gemm", "MatMul") or index != 0 or array(node.inputs[1]) is None:
        return False
    return int_attribute(node, "transA", 0) == 0 and len(static_dims(node.inputs[1]) or ()) == 2
