"""The mean of a layer's input over its positions, as nodes of a graph."""

from __future__ import annotations

import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import need


def pooled(tape: Tape, node: ir.Node, layer: str) -> ir.Value:
    """(batch, channels): what ``node`` takes, averaged over all positions; as it is if there are none.

    The channels of a convolution's input are its second axis, of a fully connected layer's the last.
    """
    x = need(node.inputs[0])
    batch, *rest = dims(x)
    if not rest[1:]:
        return x
    if node.op_type != "Conv":
        axes = tape.ints(*range(1, len(rest)))
        return tape.op(
            "ReduceMean", x, axes, shape=(batch, rest[-1]), name=f"{layer}.pooled", attributes={"keepdims": 0}
        )
    mean = tape.op("GlobalAveragePool", x, shape=(batch, rest[0], *[1] * len(rest[1:])), name=f"{layer}.mean")
    return tape.op("Flatten", mean, shape=(batch, rest[0]), name=f"{layer}.pooled")
