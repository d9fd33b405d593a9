"""Gates over channels and positions in a graph: x * 2 sigmoid(channels of pool(x)) * 2 sigmoid(positions of x).

In the spirit of memory-efficient adaptive attention (Aswani et al., arXiv 2110.10969), whose exact equations are not
public; the channel gate is a bottleneck as in squeeze-and-excitation (arXiv 1709.01507).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import need
from lorac_exporters.modules.pooling import pooled
from lorac_exporters.modules.sites import GATES
from lorac_exporters.plan import SiteModule

KIND = GATES
GATED = ("gated_channels", "gated")  # endings of what a layer then takes; both are products with their first factor
CHANNEL_TENSORS = 4  # gate_down, gate_down_bias, gate_up, gate_up_bias; gate_space and its bias follow


def insert(
    tape: Tape,
    modules: Sequence[SiteModule],
    layers: Mapping[str, ir.Node],
    tensors: Mapping[str, Sequence[ir.Value]],
    head: ir.Node,
) -> None:
    """Put the gates of ``modules`` on the inputs of their layers, in place; other readers of the same value keep it."""
    del head
    for module in modules:
        node, own = layers[module.layer], tensors[module.layer]
        gated = _by_channel(tape, node, module.layer, own[:CHANNEL_TENSORS], doubled=len(own) > CHANNEL_TENSORS)
        if len(own) > CHANNEL_TENSORS:
            gated = _by_position(tape, node, module.layer, own[CHANNEL_TENSORS:], gated)
        node.replace_input_with(0, gated)


def _by_channel(tape: Tape, node: ir.Node, layer: str, tensors: Sequence[ir.Value], *, doubled: bool) -> ir.Value:
    """x * 2 sigmoid(...), with ``doubled`` x * 4 sigmoid(...): the factor 2 of the gate over positions rides along."""
    x, (down, down_bias, up, up_bias) = need(node.inputs[0]), tensors
    mean, turned = pooled(tape, node, layer), {"transB": 1}
    shape = (dims(mean)[0], sizes(down)[0])
    squeezed = tape.op("Gemm", mean, down, down_bias, shape=shape, name=f"{layer}.gate_squeezed", attributes=turned)
    hidden = tape.op("Relu", squeezed, like=squeezed, name=f"{layer}.gate_hidden")
    logits = tape.op("Gemm", hidden, up, up_bias, like=mean, name=f"{layer}.gate_logits", attributes=turned)
    share = tape.op("Sigmoid", logits, like=logits, name=f"{layer}.gate_channels")
    factor = tape.op("Mul", share, 4.0 if doubled else 2.0, like=share, name=f"{layer}.gate_factor")
    return tape.op("Mul", x, _beside(tape, factor, node, layer), like=x, name=f"{layer}.{GATED[0]}")


def _by_position(tape: Tape, node: ir.Node, layer: str, tensors: Sequence[ir.Value], gated: ir.Value) -> ir.Value:
    """``gated`` * sigmoid(a 1 x 1 convolution of x to one channel)."""
    x = need(node.inputs[0])
    shape = (dims(x)[0], 1, *dims(x)[2:])
    logits = tape.op("Conv", x, *tensors, shape=shape, name=f"{layer}.gate_map")
    share = tape.op("Sigmoid", logits, like=logits, name=f"{layer}.gate_positions")
    return tape.op("Mul", gated, share, like=x, name=f"{layer}.{GATED[1]}")


def _beside(tape: Tape, factor: ir.Value, node: ir.Node, layer: str) -> ir.Value:
    """(batch, channels) with an axis of size 1 for each position axis of what ``node`` takes."""
    ones = [1] * (len(dims(need(node.inputs[0]))) - 2)
    if not ones:
        return factor
    (size,) = sizes(factor, 1)
    shape = (size, *ones) if node.op_type == "Conv" else (*ones, size)
    return tape.op(
        "Reshape", factor, tape.ints(-1, *shape), shape=(dims(factor)[0], *shape), name=f"{layer}.gate_spread"
    )
