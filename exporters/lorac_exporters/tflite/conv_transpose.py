"""ConvTranspose as a convolution that computes a block of stride x stride pixels for each position of its input.

TFLite's own TRANSPOSE_CONV keeps the batch size inside a constant, so a file with it cannot be resized; computing
that constant in the graph makes every shape behind it dynamic, which shuts XNNPACK out.

Output pixel stride * q + p is the sum over taps j of x[q - j] * w[stride * j + p]. A kernel as large as the stride
has one tap, and the weight is stored as it is, only reordered; else taps lie backwards, some of them zeros.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import input_at, int_attribute, ints_attribute, name_of, text_attribute
from lorac_exporters.tflite.arranging import reshaped
from lorac_exporters.tflite.convolution import bias_of, constant_input
from lorac_exporters.tflite.lowering import Lowering, Rule, need_array
from lorac_exporters.tflite.network import Option, Tensor
from lorac_exporters.tflite.padding import bind_image, emit_image, image, pad

_CONV: dict[str, Option] = {
    "padding": "VALID",
    "stride_h": 1,
    "stride_w": 1,
    "dilation_h_factor": 1,
    "dilation_w_factor": 1,
    "fused_activation_function": "NONE",
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """A transposed convolution along one axis: ``count`` pixels of output, behind ``before`` that are cut off."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    count: int

    @property
    def span(self) -> int:
        """Pixels that one input position reaches."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def taps(self) -> int:
        """Input positions that reach one output pixel, at most."""
        return -(-self.span // self.stride)

    @property
    def blocks(self) -> tuple[int, int]:
        """The first block of output pixels that is needed, and how many.

        >>> Axis(size=4, kernel=4, stride=2, dilation=1, before=1, count=8).blocks
        (0, 5)
        """
        first = min(self.before // self.stride, self.taps - 1)
        last = (self.before + self.count - 1) // self.stride
        return first, max(last, self.size - 1) - first + 1

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros to put around the input, so that a VALID convolution computes these blocks.

        >>> Axis(size=4, kernel=4, stride=2, dilation=1, before=1, count=8).pads
        (1, 1)
        """
        first, count = self.blocks
        return self.taps - 1 - first, first + count - self.size

    @property
    def cut(self) -> int:
        """Pixels to cut off at the start."""
        return self.before - self.blocks[0] * self.stride


Axes = tuple[Axis, Axis]


def conv_transpose(lowering: Lowering, node: ir.Node) -> None:
    """ConvTranspose with constant weight and bias on a sequence or an image."""
    weight = constant_input(lowering, node, 1, "weight")
    axes = _axes(lowering, node, weight)
    data = image(lowering, node.inputs[0])
    if any(axis.pads != (0, 0) for axis in axes):
        data = pad(lowering, data, [(0, 0), *(axis.pads for axis in axes), (0, 0)])
    kernel, output = _kernel(lowering, node, weight, axes), node.outputs[0]
    if all(axis.stride == 1 and axis.cut == 0 and axis.blocks[1] == axis.count for axis in axes):
        emit_image(lowering, "CONV_2D", [data, kernel, bias_of(lowering, node)], output, _CONV)
        return
    pixels = _cut(lowering, _unfolded(lowering, _convolved(lowering, node, data, kernel, axes), axes), axes)
    if input_at(node, 2) is not None:  # one number per channel, which can be patched; an activation joins the ADD
        inputs = [pixels, bias_of(lowering, node)]
        emit_image(lowering, "ADD", inputs, output, {"fused_activation_function": "NONE"})
        return
    bind_image(lowering, pixels, output)


def _axes(lowering: Lowering, node: ir.Node, weight: ir.Value) -> Axes:
    """Raises ConversionError for three-dimensional ones, and for paddings that only sizes describe."""
    size, count = lowering.dims(node.inputs[0])[2:], lowering.dims(node.outputs[0])[2:]
    if len(size) not in (1, 2):
        raise lowering.refuse(node, f"it works on {len(size)} spatial axes, expected 1 or 2")
    if text_attribute(node, "auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        raise lowering.refuse(node, "its padding follows from auto_pad or output_shape, expected pads as numbers")
    ones, pads = [1] * len(size), ints_attribute(node, "pads", [0] * 2 * len(size))
    if min(pads) < 0:
        raise lowering.refuse(node, f"pads {list(pads)} are negative")
    strides, dilations = ints_attribute(node, "strides", ones), ints_attribute(node, "dilations", ones)
    columns = zip(size, lowering.dims(weight)[2:], strides, dilations, pads, count, strict=False)
    axes = [Axis(*column) for column in columns]
    height = Axis(1, 1, 1, 1, 0, 1) if len(axes) == 1 else axes[0]
    return height, axes[-1]


def _kernel(lowering: Lowering, node: ir.Node, weight: ir.Value, axes: Axes) -> Tensor:
    """The weight (c_in, c_out / groups, kh, kw) as that of the convolution, (sh * sw * c_out, th, tw, c_in)."""
    c_in, c_out, *_ = lowering.dims(weight)
    groups = int_attribute(node, "group", 1)
    kernel, strides = (axes[0].kernel, axes[1].kernel), (axes[0].stride, axes[1].stride)
    if groups == 1 and kernel == strides and all(axis.dilation == 1 for axis in axes):
        shape = (strides[0] * strides[1] * c_out, 1, 1, c_in)
        return lowering.arranged(weight, (c_in, c_out, *kernel), (2, 3, 1, 0), shape=shape, channel_axis=1)
    content = need_array(weight).reshape(c_in, c_out, *kernel)
    return lowering.constant(f"{name_of(weight)}_by_pixel", _by_pixel(_ungrouped(content, groups), axes))


def _ungrouped(weight: npt.NDArray[np.float32], groups: int) -> npt.NDArray[np.float32]:
    """(c_in, c_out / groups, kh, kw) as (c_in, c_out, kh, kw), zeros between groups."""
    c_in, c_out, *window = weight.shape
    full = np.zeros((groups, c_in // groups, groups, c_out, *window), np.float32)
    for group, part in enumerate(weight.reshape(groups, c_in // groups, c_out, *window)):
        full[group, :, group] = part
    return full.reshape(c_in, groups * c_out, *window)


def _by_pixel(weight: npt.NDArray[np.float32], axes: Axes) -> npt.NDArray[np.float32]:
    """(c_in, c_out, kh, kw) as (sh * sw * c_out, th, tw, c_in): taps backwards, zeros where the kernel has none."""
    height, width = axes
    c_in, c_out, *_ = weight.shape
    full = np.zeros((c_in, c_out, height.taps * height.stride, width.taps * width.stride), np.float32)
    full[:, :, : height.span : height.dilation, : width.span : width.dilation] = weight
    parts = full.reshape(c_in, c_out, height.taps, height.stride, width.taps, width.stride)[:, :, ::-1, :, ::-1]
    ordered = parts.transpose(3, 5, 1, 2, 4, 0).reshape(-1, height.taps, width.taps, c_in)
    return np.ascontiguousarray(ordered)


def _convolved(lowering: Lowering, node: ir.Node, data: Tensor, kernel: Tensor, axes: Axes) -> Tensor:
    """(N, blocks, blocks, sh * sw * c_out)."""
    name = f"{name_of(node.outputs[0])}_blocks"
    none = lowering.constant(f"{name}_bias", np.zeros(kernel.shape[0], np.float32))
    shape = (data.shape[0], axes[0].blocks[1], axes[1].blocks[1], kernel.shape[0])
    inputs = [data, kernel, none]
    return lowering.emit("CONV_2D", inputs, shape, name=name, options=_CONV, batch_axis=data.batch_axis)


def _unfolded(lowering: Lowering, blocks: Tensor, axes: Axes) -> Tensor:
    """Blocks (N, h, w, sh * sw * c) as pixels (N, h * sh, w * sw, c)."""
    batch, height, width, channels = blocks.shape
    high, wide = axes[0].stride, axes[1].stride
    inner = channels // (high * wide)
    shape, name = (batch, height * high, width * wide, inner), f"{blocks.name}_pixels"
    if high == wide == 1:
        return blocks
    if high == wide:
        options: dict[str, Option] = {"block_size": high}
        return lowering.emit(
            "DEPTH_TO_SPACE", [blocks], shape, name=name, options=options, batch_axis=blocks.batch_axis
        )
    if high > 1:
        blocks = _rows_apart(lowering, blocks, high)
    return reshaped(lowering, blocks, shape, blocks.batch_axis, name=name)


def _rows_apart(lowering: Lowering, blocks: Tensor, high: int) -> Tensor:
    """(N, h, w, high * rest) as (N, h, high, w, rest)."""
    batch, height, width, channels = blocks.shape
    split = (batch, height, width, high, channels // high)
    parts = reshaped(lowering, blocks, split, blocks.batch_axis, name=f"{blocks.name}_parts")
    order = lowering.ints(f"{blocks.name}_order", (0, 1, 3, 2, 4))
    shape, name = [split[i] for i in (0, 1, 3, 2, 4)], f"{blocks.name}_rows"
    return lowering.emit("TRANSPOSE", [parts, order], shape, name=name, batch_axis=blocks.batch_axis)


def _cut(lowering: Lowering, pixels: Tensor, axes: Axes) -> Tensor:
    """Only the output's own pixels."""
    batch, height, width, channels = pixels.shape
    if (height, width) == (axes[0].count, axes[1].count):
        return pixels
    begin = lowering.ints(f"{pixels.name}_begin", (0, axes[0].cut, axes[1].cut, 0))
    size = lowering.ints(f"{pixels.name}_size", (-1, axes[0].count, axes[1].count, -1))
    shape, name = (batch, axes[0].count, axes[1].count, channels), f"{pixels.name}_cut"
    return lowering.emit("SLICE", [pixels, begin, size], shape, name=name, batch_axis=pixels.batch_axis)


RULES: dict[str, Rule] = {"ConvTranspose": conv_transpose}
