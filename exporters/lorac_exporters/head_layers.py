"""Layers of a graph as the planner sees them: convolutions, and the heads that its outputs come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, layer_name, name_of, static_dims
from lorac_exporters.heads import find_head
from lorac_exporters.linear_layers import linear_obstacle
from lorac_exporters.plan import Layer, Size
from lorac_exporters.task_graph import find_heads
from lorac_runtime.errors import ConversionError

Floats = npt.NDArray[np.float32]


def head_layers(model: ir.Model, values: Mapping[str, Floats], *, classifier: bool) -> list[Layer]:
    """The heads in the order of the graph; of a ``classifier`` the one that gives the logits.

    ``values`` are the float initializers by name. Raises ConversionError if there is none.
    """
    nodes = (find_head(model).node,) if classifier else find_heads(model)
    found: dict[str, Layer] = {}
    for node in nodes:
        found.setdefault(name_of(node.inputs[1]), _head_layer(node, values))
    return list(found.values())


def _head_layer(node: ir.Node, values: Mapping[str, Floats]) -> Layer:
    if node.op_type == "Conv":
        layer = conv_layer(node)
        return layer if layer.bias is not None else _with_bias(layer, node, values)
    weight = name_of(node.inputs[1])
    plain = Layer(layer_name(weight), weight, None, values[weight].shape, obstacle=linear_obstacle(node))
    return _with_bias(plain, node, values)


def _with_bias(layer: Layer, node: ir.Node, values: Mapping[str, Floats]) -> Layer:
    bias = input_at(node, 2)
    return layer if bias is None or bias.name not in values else dataclasses.replace(layer, bias=name_of(bias))


def map_size(value: ir.Value | None) -> Size | None:
    """Spatial size of a feature map; None where it is not fixed."""
    dims = static_dims(value)
    sizes = () if dims is None else dims[2:]
    known = tuple(size for size in sizes if size is not None)
    return None if dims is None or len(known) < len(sizes) else known


def conv_layer(node: ir.Node) -> Layer:
    """A convolution of a canonical graph.

    Raises ConversionError if its weight is computed.
    """
    weight, bias = node.inputs[1], node.inputs[2]
    assert weight is not None
    assert bias is not None
    shape = array(weight)
    if shape is None:
        raise ConversionError(f"the weight of convolution {node.name} is computed in the graph, not stored")
    shared = len(weight.uses()) > 1
    return Layer(
        name=layer_name(str(weight.name)),
        weight=str(weight.name),
        bias=None if shared else str(bias.name),
        shape=shape.shape,
        groups=node.attributes.get_int("group", 1),
        obstacle="its weight is shared with another layer" if shared else None,
        size_in=map_size(node.inputs[0]),
        size_out=map_size(node.outputs[0]),
    )
