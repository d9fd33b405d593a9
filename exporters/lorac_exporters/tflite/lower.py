"""From an ONNX graph to a TFLite network: one rule per operator, then the passes that make it lean."""

from __future__ import annotations

import onnx_ir as ir

from lorac_exporters.graph_tools import array, describe, name_of, value_names
from lorac_exporters.tflite.lowering import DTYPES, Lowering, channels_last, plain
from lorac_exporters.tflite.network import Network, Tensor
from lorac_exporters.tflite.passes import PASSES
from lorac_exporters.tflite.patterns import PATTERNS
from lorac_exporters.tflite.rules import RULES
from lorac_runtime.errors import ConversionError, listed


def lower(model: ir.Model) -> Network:
    """The float32 TFLite network of a graph in canonical form; ``model`` is not changed.

    Feature maps lie channels-last, inputs and outputs too; an input that is (N, H, W, C) already stays as it is.

    Raises ConversionError naming the node of every operator that has no rule; else the first node whose form of an
    operator its rule cannot write.
    """
    twin = model.clone()
    for pattern in PATTERNS:
        pattern(twin)
    problems = operator_problems(twin)
    if problems:
        raise ConversionError(listed("this model cannot be written to TFLite:", problems))
    network = _lowered(twin.graph)
    for shorten in PASSES:
        shorten(network)
    return network


def operator_problems(model: ir.Model) -> list[str]:
    """Nodes of operators that have no rule, a line each."""
    return [
        f"{describe(node)}: operator {node.op_type} is not among those that TFLite's writer knows"
        for node in model.graph
        if node.op_type not in RULES or node.domain != ""
    ]


def _lowered(graph: ir.Graph) -> Network:
    lowering = Lowering(graph, value_names(graph))
    inputs = [_input(lowering, value) for value in graph.inputs]
    for node in graph:
        try:
            RULES[node.op_type](lowering, node)
        except ConversionError as err:
            raise ConversionError(listed("this model cannot be written to TFLite:", [str(err)])) from err
    outputs = [_output(lowering, value) for value in graph.outputs]
    return Network(
        lowering.operators,
        inputs,
        outputs,
        tuple(name_of(v) for v in graph.inputs),
        tuple(name_of(v) for v in graph.outputs),
    )


def _input(lowering: Lowering, value: ir.Value) -> Tensor:
    """Images arrive channels-last; raw uint8 images are (N, H, W, C) in the graph already."""
    dims = lowering.dims(value)
    layout = plain(len(dims)) if value.dtype == ir.DataType.UINT8 else channels_last(len(dims))
    dtype = DTYPES[value.dtype or ir.DataType.FLOAT]
    tensor = Tensor(
        name_of(value), tuple(dims[a] for a in layout), dtype, batch_axis=0 if lowering.has_batch(value) else None
    )
    lowering.bind(value, tensor, layout)
    return tensor


def _output(lowering: Lowering, value: ir.Value) -> Tensor:
    if array(value) is not None:
        raise ConversionError(f"output {name_of(value)!r} is a constant; export a model that computes it")
    return lowering.stored(value, channels_last(len(lowering.dims(value)))).tensor
