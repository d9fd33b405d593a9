"""Gradient rules: Conv, in any number of spatial axes, with stride, padding, dilation and groups.

The gradient with respect to the input of a convolution without stride is a convolution with the flipped, transposed
weight; it is written as `Conv`, for which engines have their fastest kernels, and where the weight is a constant the
flipped one becomes a constant when the graph is loaded. The file does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.geometry import Geometry, Sizes
from lorac_exporters.gradients.phases import can_split, input_gradient_by_phases
from lorac_exporters.gradients.rule import Gradient, Rule, Site
from lorac_exporters.gradients.tape import Attributes, Tape, dims, sizes
from lorac_exporters.graph_tools import need


def conv(tape: Tape, site: Site) -> Sequence[Gradient | None]:
    """Conv: x (batch, c_in, ...), weight (c_out, c_in/groups, *kernel), bias (c_out,)."""
    geometry, x, weight = Geometry.of(site.node), site.x, need(site.node.inputs[1])
    found: list[Gradient | None] = [
        input_gradient(tape, geometry, site.grad, weight, like=x) if site.wants(0) else None,
        weight_gradient(tape, geometry, x, site.grad, like=weight) if site.wants(1) else None,
        bias_gradient(tape, geometry, site.grad) if site.wants(2) else None,
    ]
    return found[: len(site.node.inputs)]


def input_gradient(tape: Tape, g: Geometry, grad: ir.Value, weight: ir.Value, *, like: ir.Value) -> Gradient:
    """The gradient with respect to the input, of the shape of ``like``."""
    if not g.strided:
        return _as_conv(tape, g, grad, weight, like)
    if can_split(g):
        return input_gradient_by_phases(tape, g, grad, _channels_swapped(tape, g, weight), like=like)
    return _as_conv_transpose(tape, g, grad, weight, like)


def _as_conv(tape: Tape, g: Geometry, grad: ir.Value, weight: ir.Value, like: ir.Value) -> ir.Value:
    """Pads of the gradient's convolution are reach - pads; negative ones crop."""
    begins = [reach - pad for reach, pad in zip(g.reach, g.begins, strict=True)]
    ends = [reach - pad for reach, pad in zip(g.reach, g.ends, strict=True)]
    grad = _cropped(tape, grad, [max(0, -b) for b in begins], [max(0, -e) for e in ends])
    attributes: Attributes = {
        "pads": [max(0, p) for p in (*begins, *ends)],
        "dilations": g.dilations,
        "group": g.groups,
    }
    return tape.op("Conv", grad, flipped(tape, g, weight), like=like, name="grad_input", attributes=attributes)


def _cropped(tape: Tape, value: ir.Value, begins: Sequence[int], ends: Sequence[int]) -> ir.Value:
    if not any(begins) and not any(ends):
        return value
    stops = [size - end for size, end in zip(sizes(value, 2), ends, strict=True)]
    left = [stop - begin for begin, stop in zip(begins, stops, strict=True)]
    axes = tape.ints(*range(2, 2 + len(left)))
    return tape.op("Slice", value, tape.ints(*begins), tape.ints(*stops), axes, shape=(*dims(value)[:2], *left))


def flipped(tape: Tape, g: Geometry, weight: ir.Value) -> ir.Value:
    """(c_out, c_in/groups, *kernel) -> (c_in, c_out/groups, *kernel), every spatial axis reversed."""
    turned = _channels_swapped(tape, g, weight)
    if g.taps == 1:
        return turned
    axes = [axis + 2 for axis, size in enumerate(g.kernel) if size > 1]
    lowest = np.iinfo(np.int64).min
    starts, stops, steps = ([number] * len(axes) for number in (-1, lowest, -1))
    inputs = (turned, *(tape.ints(*numbers) for numbers in (starts, stops, axes, steps)))
    return tape.op("Slice", *inputs, like=turned, name="flipped")


def _channels_swapped(tape: Tape, g: Geometry, weight: ir.Value) -> ir.Value:
    outs, ins = g.c_out // g.groups, g.c_in // g.groups
    if g.groups == 1:
        perm = [1, 0, *range(2, 2 + g.rank)]
        return tape.op("Transpose", weight, shape=(ins, outs, *g.kernel), attributes={"perm": perm}, name="turned")
    if outs == ins == 1:
        return weight
    apart = (g.groups, outs, ins, *g.kernel)
    split = tape.op("Reshape", weight, tape.ints(*apart), shape=apart)
    perm = [0, 2, 1, *range(3, 3 + g.rank)]
    turned = tape.op("Transpose", split, shape=(g.groups, ins, outs, *g.kernel), attributes={"perm": perm})
    joined = (g.c_in, outs, *g.kernel)
    return tape.op("Reshape", turned, tape.ints(*joined), shape=joined, name="turned")


def _as_conv_transpose(tape: Tape, g: Geometry, grad: ir.Value, weight: ir.Value, like: ir.Value) -> ir.Value:
    attributes: Attributes = {
        "strides": g.strides,
        "pads": (*g.begins, *g.ends),
        "dilations": g.dilations,
        "group": g.groups,
        "output_padding": g.unread,
    }
    return tape.op("ConvTranspose", grad, weight, like=like, name="grad_input", attributes=attributes)


def bias_gradient(tape: Tape, g: Geometry, grad: ir.Value) -> ir.Value:
    """(batch, c_out, ...) -> (c_out,)."""
    axes = tape.ints(0, *range(2, 2 + g.rank))
    return tape.op("ReduceSum", grad, axes, shape=(g.c_out,), attributes={"keepdims": 0}, name="grad_bias")


def weight_gradient(tape: Tape, g: Geometry, x: ir.Value, grad: ir.Value, *, like: ir.Value) -> ir.Value:
    """The gradient with respect to the weight: products of the output's gradient with shifted inputs, summed.

    The tensor with fewer channels is the one that is shifted, once for each tap of the kernel.
    """
    if _shift_gradient(g):
        product = _product(tape, g, x, _shifted_gradients(tape, g, grad), g.c_in, g.taps * g.c_out)
        return _arranged(tape, g, product, first="c_in", like=like)
    columns = _columns(tape, g, x)
    product = _product(tape, g, grad, columns, g.c_out, g.taps * g.c_in)
    return _arranged(tape, g, product, first="c_out", like=like)


def _shift_gradient(g: Geometry) -> bool:
    return not g.strided and g.taps > 1 and g.c_out < g.c_in


def _columns(tape: Tape, g: Geometry, x: ir.Value) -> ir.Value:
    """For every tap the input that it meets: (batch, c_in, ...) -> (batch, [groups,] taps * c_in/groups, positions)."""
    padded = _padded(tape, x, g.begins, g.ends)
    offsets = itertools.product(*(range(0, r + 1, d) for r, d in zip(g.reach, g.dilations, strict=True)))
    return _stacked(tape, g, padded, list(offsets), g.c_in, g.out_size, g.strides)


def _shifted_gradients(tape: Tape, g: Geometry, grad: ir.Value) -> ir.Value:
    """For every tap the output gradient that an input meets: -> (batch, [groups,] taps * c_out/groups, positions)."""
    begins = [reach - pad for reach, pad in zip(g.reach, g.begins, strict=True)]
    ends = [reach - pad for reach, pad in zip(g.reach, g.ends, strict=True)]
    padded = _padded(tape, grad, begins, ends)
    offsets = itertools.product(*(range(r, -1, -d) for r, d in zip(g.reach, g.dilations, strict=True)))
    return _stacked(tape, g, padded, list(offsets), g.c_out, g.in_size, (1,) * g.rank)


def _padded(tape: Tape, value: ir.Value, begins: Sequence[int], ends: Sequence[int]) -> ir.Value:
    if not any(begins) and not any(ends):
        return value
    grown = [size + b + e for size, b, e in zip(sizes(value, 2), begins, ends, strict=True)]
    return tape.op("Pad", value, tape.ints(0, 0, *begins, 0, 0, *ends), shape=(*dims(value)[:2], *grown))


def _stacked(
    tape: Tape,
    g: Geometry,
    padded: ir.Value,
    offsets: Sequence[Sequence[int]],
    channels: int,
    size: Sequence[int],
    strides: Sequence[int],
) -> ir.Value:
    """Windows of ``padded`` at the offsets, stacked along the channels of each group, positions flattened."""
    batch, positions = dims(padded)[0], math.prod(size)
    windows = [_window(tape, padded, offset, size, strides) for offset in offsets]
    if g.groups > 1 and len(windows) > 1:
        windows = [_flat(tape, g, window) for window in windows]
        grouped = (batch, g.groups, len(windows) * channels // g.groups, positions)
        return tape.op("Concat", *windows, shape=grouped, attributes={"axis": 2}, name="columns")
    stacked = windows[0]
    if len(windows) > 1:
        shape = (batch, len(windows) * channels, *size)
        stacked = tape.op("Concat", *windows, shape=shape, attributes={"axis": 1}, name="columns")
    return _flat(tape, g, stacked)


def _flat(tape: Tape, g: Geometry, value: ir.Value) -> ir.Value:
    """(batch, channels, ...) -> (batch, [groups,] channels/groups, positions)."""
    channels, *size = sizes(value, 1)
    shape: Sizes = (channels // g.groups, math.prod(size))
    if g.groups > 1:
        shape = (g.groups, *shape)
    return tape.op("Reshape", value, tape.ints(0, *shape), shape=(dims(value)[0], *shape))


def _window(
    tape: Tape, padded: ir.Value, offset: Sequence[int], size: Sequence[int], strides: Sequence[int]
) -> ir.Value:
    shape = dims(padded)
    stops = [o + s * (n - 1) + 1 for o, n, s in zip(offset, size, strides, strict=True)]
    if not any(offset) and tuple(stops) == shape[2:] and max(strides) == 1:
        return padded
    axes = tape.ints(*range(2, len(shape)))
    inputs = (padded, tape.ints(*offset), tape.ints(*stops), axes, tape.ints(*strides))
    return tape.op("Slice", *inputs, shape=(*shape[:2], *size), name="window")


def _product(tape: Tape, g: Geometry, left: ir.Value, right: ir.Value, rows: int, columns: int) -> ir.Value:
    """Sum over batch and positions of left x right: -> ([groups,] rows/groups, columns/groups).

    Sample by sample and then summed, unless the products of all samples would be larger than what they are made of.
    """
    left = _flat(tape, g, left)
    rows, columns = rows // g.groups, columns // g.groups
    positions = sizes(right, 1)[-1]
    if g.groups == 1 and rows * columns > (rows + columns) * positions:
        return _one_product(tape, left, right, rows, columns)
    lead = dims(right)[:-2]
    perm = [*range(len(lead)), len(lead) + 1, len(lead)]
    turned = tape.op("Transpose", right, shape=(*lead, positions, columns), attributes={"perm": perm})
    products = tape.op("MatMul", left, turned, shape=(*lead, rows, columns), name="grad_products")
    return tape.op("ReduceSum", products, tape.ints(0), shape=(*lead[1:], rows, columns), attributes={"keepdims": 0})


def _one_product(tape: Tape, left: ir.Value, right: ir.Value, rows: int, columns: int) -> ir.Value:
    """One matrix product over batch and positions together."""
    lefts = tape.op("Transpose", left, shape=(rows, *dims(left)[::2]), attributes={"perm": [1, 0, 2]})
    rights = tape.op("Transpose", right, shape=(*dims(right)[::2], columns), attributes={"perm": [0, 2, 1]})
    flat_left = tape.op("Reshape", lefts, tape.ints(rows, -1), shape=(rows, None))
    flat_right = tape.op("Reshape", rights, tape.ints(-1, columns), shape=(None, columns))
    return tape.op("MatMul", flat_left, flat_right, shape=(rows, columns), name="grad_product")


def _arranged(tape: Tape, g: Geometry, product: ir.Value, *, first: str, like: ir.Value) -> ir.Value:
    """([groups,] first, taps * second) -> the weight's shape (c_out, c_in/groups, *kernel)."""
    lead = () if g.groups == 1 else (g.groups,)
    outs, ins = g.c_out // g.groups, g.c_in // g.groups
    rows, second = (outs, ins) if first == "c_out" else (ins, outs)
    if g.taps == 1 and first == "c_out":
        return tape.op("Reshape", product, tape.ints(*sizes(like)), like=like, name="grad_weight")
    apart = (*lead, rows, g.taps, second)
    split = tape.op("Reshape", product, tape.ints(*apart), shape=apart)
    order = (0, 2, 1) if first == "c_out" else (2, 0, 1)
    perm = [*range(len(lead)), *(len(lead) + axis for axis in order)]
    shape = (*lead, outs, ins, g.taps)
    turned = tape.op("Transpose", split, shape=shape, attributes={"perm": perm})
    return tape.op("Reshape", turned, tape.ints(*sizes(like)), like=like, name="grad_weight")


RULES: dict[str, Rule] = {"Conv": conv}
