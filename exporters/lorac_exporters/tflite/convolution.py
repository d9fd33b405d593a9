"""Conv: CONV_2D, also in groups, and DEPTHWISE_CONV_2D where every channel is a group.

Both runtimes compute grouped CONV_2D rightly. Splitting into groups instead makes tflite-runtime 2.14.0 with
several threads a thousand times slower, and tears a weight into pieces that could not be patched as one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, int_attribute, name_of, need
from lorac_exporters.tflite.lowering import Lowering, Rule
from lorac_exporters.tflite.network import Option, Tensor
from lorac_exporters.tflite.padding import Axes, emit_image, image, padded, strides_of, window_axes
from lorac_exporters.tflite.shuffling import shuffled_by


def convolution(lowering: Lowering, node: ir.Node) -> None:
    """Conv with constant weight and bias on a sequence or an image."""
    weight = constant_input(lowering, node, 1, "weight")
    axes = window_axes(lowering, node)
    data, padding = padded(lowering, image(lowering, node.inputs[0]), axes)
    options = _options(axes) | {"padding": padding}
    channels, groups = data.shape[-1], int_attribute(node, "group", 1)
    if groups == channels and groups > 1:
        kernel = _depthwise(lowering, weight)
        options["depth_multiplier"] = kernel.shape[-1] // channels
        inputs = [data, kernel, bias_of(lowering, node)]
        emit_image(lowering, "DEPTHWISE_CONV_2D", inputs, node.outputs[0], options)
        return
    block = shuffled_by(node.outputs[0])
    inputs = [data, _dense(lowering, weight, block), bias_of(lowering, node, block=block)]
    emit_image(lowering, "CONV_2D", inputs, node.outputs[0], options)


def constant_input(lowering: Lowering, node: ir.Node, index: int, what: str) -> ir.Value:
    """An input that must be a constant. Raises ConversionError if it is computed."""
    value = need(node.inputs[index])
    if array(value) is None:
        raise lowering.refuse(node, f"its {what} {name_of(value)!r} is computed by the graph, expected a constant")
    return value


def bias_of(lowering: Lowering, node: ir.Node, *, block: int = 1) -> Tensor:
    """The bias (c_out,), zeros if the node has none; its channels in the order that a pixel shuffle wants."""
    channels = lowering.dims(node.outputs[0])[1]
    if input_at(node, 2) is None:
        return lowering.constant(f"{name_of(node.outputs[0])}_bias", np.zeros(channels, np.float32))
    bias = constant_input(lowering, node, 2, "bias")
    if block == 1:
        return lowering.stored(bias).tensor
    return lowering.arranged(bias, (channels // block**2, block**2), (1, 0), shape=(channels,))


def _options(axes: Axes) -> dict[str, Option]:
    dilation: dict[str, Option] = {"dilation_h_factor": axes[0].dilation, "dilation_w_factor": axes[1].dilation}
    return strides_of(axes) | dilation


def _dense(lowering: Lowering, weight: ir.Value, block: int) -> Tensor:
    """(c_out, c_in / groups, kh, kw) stored as (c_out, kh, kw, c_in / groups)."""
    c_out, c_in, height, width = _as_image_kernel(lowering, weight)
    if block == 1:
        return lowering.arranged(weight, (c_out, c_in, height, width), (0, 2, 3, 1))
    view = (c_out // block**2, block**2, c_in, height, width)
    return lowering.arranged(weight, view, (1, 0, 3, 4, 2), shape=(c_out, height, width, c_in))


def _depthwise(lowering: Lowering, weight: ir.Value) -> Tensor:
    """(c_out, 1, kh, kw) stored as (1, kh, kw, c_out)."""
    return lowering.arranged(weight, _as_image_kernel(lowering, weight), (1, 2, 3, 0))


def _as_image_kernel(lowering: Lowering, weight: ir.Value) -> tuple[int, int, int, int]:
    dims = lowering.dims(weight)
    c_out, c_in, *window = dims
    return c_out, c_in, 1 if len(window) == 1 else window[0], window[-1]


RULES: dict[str, Rule] = {"Conv": convolution}
