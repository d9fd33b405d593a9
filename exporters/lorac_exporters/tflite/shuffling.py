"""DepthToSpace and SpaceToDepth: channels become pixels, and pixels channels.

TFLite keeps the channels of one pixel together (ONNX's DCR). PixelShuffle keeps the pixels of one channel together
(CRD): a convolution that feeds it computes its channels in the other order, which costs nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, consumers, input_at, int_attribute, text_attribute
from lorac_exporters.tflite.lowering import Lowering, Rule, channels_last
from lorac_exporters.tflite.network import Tensor


def depth_to_space(lowering: Lowering, node: ir.Node) -> None:
    """DepthToSpace of both modes."""
    block = int_attribute(node, "blocksize", 1)
    data = lowering.stored(node.inputs[0], channels_last(4)).tensor
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    if _mode(node) == "CRD" and (producer is None or shuffled_by(producer.outputs[0]) == 1):
        data = _pixels_outside(lowering, data, block)
    lowering.emit_for("DEPTH_TO_SPACE", [data], node.outputs[0], channels_last(4), options={"block_size": block})


def space_to_depth(lowering: Lowering, node: ir.Node) -> None:
    """SpaceToDepth; ONNX and TFLite order the channels alike."""
    data = lowering.stored(node.inputs[0], channels_last(4)).tensor
    options = {"block_size": int_attribute(node, "blocksize", 1)}
    lowering.emit_for("SPACE_TO_DEPTH", [data], node.outputs[0], channels_last(4), options=options)


def shuffled_by(value: ir.Value) -> int:
    """The block size of the pixel shuffle that alone reads a convolution's output; 1 if there is none.

    The convolution then stores its output channels with the pixels of a block outside.
    """
    node = value.producer()
    users = [user for user, _ in consumers(value)]
    if node is None or node.op_type != "Conv" or len(users) != 1 or value.is_graph_output():
        return 1
    if users[0].op_type != "DepthToSpace" or _mode(users[0]) != "CRD" or int_attribute(node, "group", 1) != 1:
        return 1
    constants = [v for v in (node.inputs[1], input_at(node, 2)) if v is not None]
    return int_attribute(users[0], "blocksize", 1) if all(array(v) is not None for v in constants) else 1


def _mode(node: ir.Node) -> str:
    return text_attribute(node, "mode", "DCR")


def _pixels_outside(lowering: Lowering, data: Tensor, block: int) -> Tensor:
    """Channels (c, pixel) -> (pixel, c)."""
    channels = data.shape[-1]
    order = np.arange(channels).reshape(channels // block**2, block**2).T.ravel().tolist()
    chosen = lowering.ints(f"{data.name}_channels", order)
    name = f"{data.name}_by_pixel"
    return lowering.emit(
        "GATHER", [data, chosen], data.shape, name=name, options={"axis": 3}, batch_axis=data.batch_axis
    )


RULES: dict[str, Rule] = {"DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth}
