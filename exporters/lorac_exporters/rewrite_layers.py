"""Pooling, padding, normalisation and rearranging layers written out in operators with gradients.

Each function returns the value that replaces the node's output, or None where no equal form is known. Shapes of
the graph must be known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.cleaning import window
from lorac_exporters.graph_tools import (
    array,
    float_attribute,
    input_at,
    int_attribute,
    ints_attribute,
    need,
    static_dims,
    text_attribute,
)
from lorac_exporters.rewrite_tape import Tape
from lorac_exporters.running import run_node

Floats = npt.NDArray[np.float32]


def sum_of(tape: Tape) -> ir.Value:
    """Sum of any number of tensors, two at a time."""
    values = [need(value) for value in tape.node.inputs]
    total = values[0]
    for value in values[1:]:
        total = tape.op("Add", total, value)
    return total if len(values) > 1 else tape.op("Identity", total)


def mean_of(tape: Tape) -> ir.Value:
    """Mean of any number of tensors."""
    return tape.op("Mul", sum_of(tape), 1.0 / len(tape.node.inputs))


def global_max_pool(tape: Tape) -> ir.Value | None:
    """MaxPool whose window is the whole image."""
    size = _sizes(tape.x)[2:]
    return tape.op("MaxPool", tape.x, attributes={"kernel_shape": size}) if all(size) else None


def reduce_max(tape: Tape) -> ir.Value | None:
    """Over all spatial axes: MaxPool whose window is the whole image."""
    axes, size = array(input_at(tape.node, 1)), _sizes(tape.x)
    wanted = list(range(2, len(size)))
    if axes is None or len(size) < 3 or sorted(int(a) % len(size) for a in axes) != wanted:
        return None
    pooled = global_max_pool(tape)
    if pooled is None or int_attribute(tape.node, "keepdims", 1):
        return pooled
    return tape.op("Squeeze", pooled, tape.constant(np.array(wanted, np.int64)))


def average_pool(tape: Tape) -> ir.Value | None:
    """A depthwise convolution with ones, times one over the number of cells that each window counts.

    A signal counts as an image of height 1: gradients of grouped 1-D convolutions are wrong in some engines.
    """
    sizes, outputs = _sizes(tape.x), _sizes(tape.node.outputs[0])
    if 0 in sizes[1:] or len(outputs) != len(sizes):
        return None
    share = _share_of_cell(tape.node, sizes[2:], outputs[2:])
    uniform = bool(np.ptp(share) == 0)
    weight = np.full((sizes[1], 1, *window(tape.node)), share.flat[0] if uniform else 1.0, np.float32)
    pooled = _depthwise(tape, weight, _covering_attributes(tape.node, sizes[2:], outputs[2:]))
    return pooled if uniform else tape.op("Mul", pooled, tape.constant(share))


def _share_of_cell(node: ir.Node, size: tuple[int, ...], outputs: tuple[int, ...]) -> Floats:
    """(1, 1, *outputs): what one cell counts in each window's mean, measured on an image of ones."""
    ones = np.ones((1, 1, *size), np.float32)
    summing = ir.node("Conv", [None, None], _covering_attributes(node, size, outputs))
    return run_node(node, ones) / run_node(summing, ones, np.ones((1, 1, *window(node)), np.float32))


def _depthwise(tape: Tape, weight: Floats, attributes: dict[str, list[int]]) -> ir.Value:
    channels = weight.shape[0]
    if weight.ndim == 4:
        return tape.op("Conv", tape.x, tape.constant(weight), attributes=attributes | {"group": channels})
    row = tape.constant(np.array([2], np.int64))
    (start, end), flat = attributes["pads"], weight[:, :, None]
    lifted = {"strides": [1, *attributes["strides"]], "pads": [0, start, 0, end], "group": channels}
    lifted["kernel_shape"] = [1, *attributes["kernel_shape"]]
    result = tape.op("Conv", tape.op("Unsqueeze", tape.x, row), tape.constant(flat), attributes=lifted)
    return tape.op("Squeeze", result, row)


def _covering_attributes(node: ir.Node, size: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, list[int]]:
    """Of a convolution that visits the windows of a pooling."""
    kernel = window(node)
    strides = list(ints_attribute(node, "strides", [1] * len(kernel)))
    return {"kernel_shape": list(kernel), "strides": strides, "pads": _covering_pads(node, size, outputs)}


def _covering_pads(node: ir.Node, size: tuple[int, ...], outputs: tuple[int, ...]) -> list[int]:
    """Padding that makes a convolution visit the same windows, also the last ones of ``ceil_mode``."""
    kernel = window(node)
    strides = ints_attribute(node, "strides", [1] * len(kernel))
    starts = ints_attribute(node, "pads", [0] * 2 * len(kernel))[: len(kernel)]
    parts = zip(outputs, strides, kernel, size, starts, strict=True)
    return [*starts, *(max(0, (out - 1) * stride + k - n - start) for out, stride, k, n, start in parts)]


def mirrored_pad(tape: Tape) -> ir.Value | None:
    """Pad in mode reflect or edge: a Gather along each padded axis."""
    mode, pads = text_attribute(tape.node, "mode", "constant"), array(input_at(tape.node, 1))
    sizes = _sizes(tape.x)
    if (mode != "reflect" and mode != "edge") or pads is None or input_at(tape.node, 3) is not None:
        return None
    value = tape.x
    for axis, (before, after) in enumerate(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True)):
        if before or after:
            if before < 0 or after < 0 or not sizes[axis]:
                return None
            cells, widths = np.arange(sizes[axis]), (int(before), int(after))
            source = np.pad(cells, widths, "reflect") if mode == "reflect" else np.pad(cells, widths, "edge")
            value = tape.op("Gather", value, tape.constant(source.astype(np.int64)), attributes={"axis": axis})
    return value


def instance_normalization(tape: Tape) -> ir.Value:
    """(x - mean) / sqrt(var + eps) * scale + bias, statistics over the spatial axes of each sample."""
    rank = len(_sizes(tape.x))
    scale, bias = (_column(tape, index, rank) for index in (1, 2))
    unit = _standardized(tape, list(range(2, rank)), float_attribute(tape.node, "epsilon", 1e-5))
    return tape.op("Add", tape.op("Mul", unit, scale), bias)


def layer_normalization(tape: Tape) -> ir.Value | None:
    """(x - mean) / sqrt(var + eps) * scale + bias, statistics over the axes from ``axis`` on."""
    if any(output.uses() for output in tape.node.outputs[1:]):
        return None
    rank = len(_sizes(tape.x))
    first = int_attribute(tape.node, "axis", -1) % rank
    unit = _standardized(tape, list(range(first, rank)), float_attribute(tape.node, "epsilon", 1e-5))
    scaled = tape.op("Mul", unit, need(tape.node.inputs[1]))
    bias = input_at(tape.node, 2)
    return scaled if bias is None else tape.op("Add", scaled, bias)


def _standardized(tape: Tape, axes: list[int], eps: float) -> ir.Value:
    where = tape.constant(np.array(axes, np.int64))
    centred = tape.op("Sub", tape.x, tape.op("ReduceMean", tape.x, where, attributes={"keepdims": 1}))
    variance = tape.op("ReduceMean", tape.op("Mul", centred, centred), where, attributes={"keepdims": 1})
    return tape.op("Div", centred, tape.op("Sqrt", tape.op("Add", variance, eps)))


def _column(tape: Tape, index: int, rank: int) -> ir.Value:
    """A per-channel vector as (1, channels, 1, ...)."""
    shape = tape.constant(np.array([1, -1, *[1] * (rank - 2)], np.int64))
    return tape.op("Reshape", need(tape.node.inputs[index]), shape)


def depth_to_space(tape: Tape) -> ir.Value | None:
    """Reshape, Transpose, Reshape (PixelShuffle is mode CRD)."""
    _, channels, height, width = _sizes(tape.x)
    block = int_attribute(tape.node, "blocksize", 1)
    depth = channels // block**2
    if text_attribute(tape.node, "mode", "DCR") == "CRD":
        split, order = [-1, depth, block, block, height, width], [0, 1, 4, 2, 5, 3]
    else:
        split, order = [-1, block, block, depth, height, width], [0, 3, 4, 1, 5, 2]
    return _rearranged(tape, split, order, [-1, depth, height * block, width * block])


def space_to_depth(tape: Tape) -> ir.Value | None:
    """Reshape, Transpose, Reshape."""
    _, channels, height, width = _sizes(tape.x)
    block = int_attribute(tape.node, "blocksize", 1)
    split = [-1, channels, height // block, block, width // block, block]
    return _rearranged(tape, split, [0, 3, 5, 1, 2, 4], [-1, channels * block**2, height // block, width // block])


def _rearranged(tape: Tape, split: list[int], order: list[int], joined: list[int]) -> ir.Value | None:
    if 0 in split[1:]:
        return None
    parts = tape.op("Reshape", tape.x, tape.constant(np.array(split, np.int64)))
    turned = tape.op("Transpose", parts, attributes={"perm": order})
    return tape.op("Reshape", turned, tape.constant(np.array(joined, np.int64)))


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """Sizes of a value; 0 stands for the batch, and for what is not known."""
    return tuple(dim or 0 for dim in static_dims(value) or ())
