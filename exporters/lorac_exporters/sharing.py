"""Un-merge parameters: exporters store tensors of equal value once, and then they cannot change on their own.

A weight that two convolutions or linear layers read may be a real tie of the architecture, and untying it would
change what the model is: it is kept as one tensor (layers that share it stay frozen). Biases, BN parameters and
statistics, and other vectors of equal value get a copy for each reader, named after the reader's layer.
"""

from __future__ import annotations

import onnx_ir as ir

from lorac_exporters.graph_tools import (
    WEIGHTED,
    constant,
    consumers,
    float_array,
    name_of,
    set_input,
    unique_name,
    value_names,
)
from lorac_exporters.naming import Layers, batchnorm_layers, parameter_name

Use = tuple[ir.Node, int]


def unshare(graph: ir.Graph) -> list[str]:
    """Give each reader of a shared float tensor (at least 1-D) its own copy; returns what was changed."""
    layers = batchnorm_layers(graph)
    changes: list[str] = []
    for value in list(graph.initializers.values()):
        uses = list(consumers(value))
        if value.dtype == ir.DataType.FLOAT and len(value.shape or ()) > 0 and len(uses) > 1:
            changes += _split(graph, value, uses, layers)
    return changes


def _split(graph: ir.Graph, value: ir.Value, uses: list[Use], layers: Layers) -> list[str]:
    tied = [use for use in uses if is_weight(*use)]
    keepers = tied or [_owner(name_of(value), uses, layers)]
    changes = []
    if len(tied) > 1:
        changes = [f"{value.name}: shared by {len(tied)} layers, kept as one tensor"]
    for node, index in (use for use in uses if use not in keepers):
        name = unique_name(_wish(node, index, value, layers), value_names(graph))
        set_input(node, index, constant(graph, name, float_array(value).copy()))
        changes.append(f"{name}: its own copy of {value.name}, which several layers shared")
    return changes


def is_weight(node: ir.Node, index: int) -> bool:
    """Whether an input is the weight of a convolution or linear layer."""
    if node.domain != "" or node.op_type not in WEIGHTED:
        return False
    return index == 1 or (node.op_type in ("Gemm", "MatMul") and index == 0)


def _owner(name: str, uses: list[Use], layers: Layers) -> Use:
    """The reader that the tensor is named after, else the first."""
    named = (use for use in uses if parameter_name(*use, layers) == name)
    return next(named, uses[0])


def _wish(node: ir.Node, index: int, value: ir.Value, layers: Layers) -> str:
    return parameter_name(node, index, layers) or name_of(value)
