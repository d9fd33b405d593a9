"""Windows that move over feature maps: what convolutions and pools have in common, and how they are padded.

ONNX gives the number of cells to add on each side. TFLite knows VALID (none) and SAME (as many as needed for
ceil(size / stride) windows, the odd cell at the end); everything else is a PAD operator and VALID.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from lorac_exporters.cleaning import window
from lorac_exporters.graph_tools import (
    array,
    bypass,
    consumers,
    ints_attribute,
    name_of,
    need,
    nodes_of,
    text_attribute,
)
from lorac_exporters.tflite.arranging import reshaped
from lorac_exporters.tflite.lowering import Lowering, channels_last
from lorac_exporters.tflite.network import Option, Tensor

Mode = Literal["SAME", "VALID"]
LOWEST = float(np.finfo(np.float32).min)  # padding that no maximum chooses


@dataclasses.dataclass(frozen=True)
class Axis:
    """Windows along one axis: ``count`` of them over ``size`` cells, the first one ``before`` cells ahead of the start.

    ``after`` are the cells that ONNX adds at the end; windows may need fewer, or more (ceil_mode).
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    count: int

    @property
    def span(self) -> int:
        """Cells from the first to the last of a window."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def needed(self) -> tuple[int, int]:
        """Cells to add before and after, so that ``count`` windows fit.

        >>> Axis(size=8, kernel=3, stride=2, dilation=1, before=1, after=1, count=4).needed
        (1, 0)
        """
        return self.before, max(0, (self.count - 1) * self.stride + self.span - self.size - self.before)

    @property
    def same(self) -> tuple[int, int] | None:
        """Cells that TFLite's SAME adds; None if it would make another number of windows, or leave cells over.

        >>> Axis(size=8, kernel=3, stride=2, dilation=1, before=1, after=1, count=4).same
        (0, 1)
        """
        if self.count != -(-self.size // self.stride):
            return None
        total = (self.count - 1) * self.stride + self.span - self.size
        if total < 0:  # cells left over: XNNPACK of tflite-runtime 2.14.0 takes that for a huge padding
            return None
        return total // 2, total - total // 2


Axes = tuple[Axis, Axis]


def window_axes(lowering: Lowering, node: ir.Node) -> Axes:
    """The windows of a convolution or pool along height and width; a sequence is an image of height 1.

    Raises ConversionError for three-dimensional ones, and for paddings that TFLite cannot do.
    """
    size, count = lowering.dims(node.inputs[0])[2:], lowering.dims(node.outputs[0])[2:]
    if len(size) not in (1, 2):
        raise lowering.refuse(node, f"it works on {len(size)} spatial axes, expected 1 or 2")
    if text_attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise lowering.refuse(node, "auto_pad must be written out as numbers (lorac_exporters.cleaning.explicit_pads)")
    ones, pads = [1] * len(size), ints_attribute(node, "pads", [0] * 2 * len(size))
    if min(pads) < 0:
        raise lowering.refuse(node, f"pads {list(pads)} are negative, which cuts cells off; use a Slice")
    strides, dilations = ints_attribute(node, "strides", ones), ints_attribute(node, "dilations", ones)
    before, after = pads[: len(size)], pads[len(size) :]
    columns = zip(size, window(node), strides, dilations, before, after, count, strict=True)
    axes = [Axis(*column) for column in columns]
    height = Axis(1, 1, 1, 1, 0, 0, 1) if len(axes) == 1 else axes[0]
    return height, axes[-1]


def padding_of(axes: Axes) -> Mode | None:
    """How TFLite pads in these windows; None if it takes a PAD operator."""
    if all(axis.needed == (0, 0) for axis in axes):
        return "VALID"
    return "SAME" if all(axis.needed == axis.same for axis in axes) else None


def padded(lowering: Lowering, tensor: Tensor, axes: Axes, *, fill: float = 0.0) -> tuple[Tensor, Mode]:
    """The (N, H, W, C) tensor with the cells that TFLite does not add by itself, and how to pad from there."""
    mode = padding_of(axes)
    return (tensor, mode) if mode is not None else (enlarged(lowering, tensor, axes, fill=fill), "VALID")


def enlarged(lowering: Lowering, tensor: Tensor, axes: Axes, *, fill: float = 0.0) -> Tensor:
    """The (N, H, W, C) tensor with all cells that the windows need."""
    return pad(lowering, tensor, [(0, 0), *(axis.needed for axis in axes), (0, 0)], fill=fill)


def pad(lowering: Lowering, tensor: Tensor, pads: Sequence[tuple[int, int]], *, fill: float = 0.0) -> Tensor:
    """A PAD operator, PADV2 where ``fill`` is not zero; ``pads``: (before, after) of each stored axis."""
    shape = [size + sum(pair) for size, pair in zip(tensor.shape, pads, strict=True)]
    inputs = [tensor, lowering.constant(f"{tensor.name}_paddings", np.array(pads, np.int32))]
    if fill:
        inputs.append(lowering.constant(f"{tensor.name}_padding_value", np.array(fill, np.float32)))
    kind, name = "PADV2" if fill else "PAD", f"{tensor.name}_padded"
    return lowering.emit(kind, inputs, shape, name=name, batch_axis=tensor.batch_axis)


def strides_of(axes: Axes) -> dict[str, Option]:
    """The options that convolutions and pools share."""
    return {"stride_h": axes[0].stride, "stride_w": axes[1].stride}


def image(lowering: Lowering, value: ir.Value | None) -> Tensor:
    """The stored (N, H, W, C) tensor of a feature map; a sequence (N, C, L) becomes (N, 1, L, C)."""
    rank = len(lowering.dims(value))
    tensor = lowering.stored(value, channels_last(rank)).tensor
    if rank == 4:
        return tensor
    batch, length, channels = tensor.shape
    shape = (batch, 1, length, channels)
    return reshaped(lowering, tensor, shape, tensor.batch_axis, name=f"{tensor.name}_image")


def emit_image(
    lowering: Lowering,
    kind: str,
    inputs: Sequence[Tensor | None],
    value: ir.Value,
    options: dict[str, Option] | None = None,
) -> None:
    """The operator on (N, H, W, C) tensors that computes a feature map or, at height 1, a sequence."""
    dims = lowering.dims(value)
    if len(dims) == 4:
        lowering.emit_for(kind, inputs, value, channels_last(4), options=options)
        return
    batch = 0 if lowering.has_batch(value) else None
    shape = (dims[0], 1, dims[2], dims[1])
    name = f"{value.name}_image"
    bind_image(lowering, lowering.emit(kind, inputs, shape, name=name, options=options, batch_axis=batch), value)


def bind_image(lowering: Lowering, tensor: Tensor, value: ir.Value) -> None:
    """Record that ``tensor`` (N, H, W, C), made for ``value``, holds it; a RESHAPE where that is a sequence."""
    dims = lowering.dims(value)
    if len(dims) == 4:
        tensor.name = name_of(value)
        lowering.bind(value, tensor, channels_last(4))
        return
    target = (-1 if lowering.has_batch(value) else dims[0], dims[2], dims[1])
    inputs = [tensor, lowering.ints(f"{value.name}_shape", target)]
    lowering.emit_for("RESHAPE", inputs, value, channels_last(3))


def merge_pads(model: ir.Model) -> None:
    """Zeros that a Pad node puts around an image, and only a convolution reads, become the convolution's own pads."""
    for node in nodes_of(model.graph, "Pad"):
        uses = list(consumers(node.outputs[0]))
        pads = _image_pads(node)
        if pads is None or len(uses) != 1 or uses[0][0].op_type != "Conv" or uses[0][1] != 0:
            continue
        if node.outputs[0].is_graph_output() or text_attribute(uses[0][0], "auto_pad", "NOTSET") != "NOTSET":
            continue
        own = ints_attribute(uses[0][0], "pads", [0] * len(pads))
        both = [a + b for a, b in zip(pads, own, strict=True)]
        uses[0][0].attributes["pads"] = ir.AttrInt64s("pads", both)
        bypass(node)


def _image_pads(node: ir.Node) -> list[int] | None:
    """The pads of a Pad node in a convolution's terms; None if it does anything but put zeros around an image."""
    pads = array(node.inputs[1])
    if pads is None or text_attribute(node, "mode", "constant") != "constant" or len(node.inputs) > 3:
        return None
    if len(node.inputs) == 3 and node.inputs[2] is not None:
        fill = array(node.inputs[2])
        if fill is None or np.any(fill):
            return None
    sides = pads.astype(np.int64).reshape(2, -1)
    shape = need(node.inputs[0]).shape
    if shape is None or sides.shape[1] != len(shape) or np.any(sides < 0) or np.any(sides[:, :2]):
        return None
    return [int(p) for p in sides[:, 2:].ravel()]
