"""Concat, Split, Slice, Pad, Gather and Cast: axes of ONNX mapped to where they are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, int_attribute, need, text_attribute
from lorac_exporters.tflite.arranging import common_layout
from lorac_exporters.tflite.elementwise import alias
from lorac_exporters.tflite.lowering import DTYPES, Layout, Lowering, Rule, Stored
from lorac_exporters.tflite.network import DType, Operator, Option, Tensor

_OPEN = np.iinfo(np.int64).max  # ONNX ends at or beyond this mean: to the end


def _concat(lowering: Lowering, node: ir.Node) -> None:
    values, out = [need(value) for value in node.inputs], node.outputs[0]
    rank = len(lowering.dims(out))
    axis = int_attribute(node, "axis", 0) % rank
    _keep_batch(lowering, node, out, axis)
    if len(values) == 1:
        return alias(lowering, node)
    layout = common_layout(lowering, values, rank)
    parts = [lowering.stored(value, layout).tensor for value in values]
    options: dict[str, Option] = {"axis": layout.index(axis), "fused_activation_function": "NONE"}
    lowering.emit_for("CONCATENATION", parts, out, layout, options=options)
    return None


def _keep_batch(lowering: Lowering, node: ir.Node, value: ir.Value, axis: int) -> None:
    """Raises ConversionError if ``axis`` is the free batch."""
    if axis == 0 and lowering.has_batch(value):
        raise lowering.refuse(node, "it works along the batch, whose size is free")


def _split(lowering: Lowering, node: ir.Node) -> None:
    """SPLIT into equal parts, else SPLIT_V."""
    value = need(node.inputs[0])
    found, dims = lowering.stored(value), lowering.dims(value)
    axis = int_attribute(node, "axis", 0) % len(dims)
    _keep_batch(lowering, node, value, axis)
    sizes = [lowering.dims(out)[axis] for out in node.outputs]
    name, count = f"{node.outputs[0].name}_split", len(sizes)
    where = Tensor(lowering.fresh(f"{name}_axis"), (), "int32", data=np.array(found.layout.index(axis), np.int32))
    outputs = [_part(lowering, out, found) for out in node.outputs]
    if count == 1:
        return lowering.bind(node.outputs[0], found.tensor, found.layout)
    if len(set(sizes)) == 1:
        operator = Operator("SPLIT", [where, found.tensor], outputs, {"num_splits": count})
    else:
        lengths = lowering.ints(f"{name}_sizes", sizes)
        operator = Operator("SPLIT_V", [found.tensor, lengths, where], outputs, {"num_splits": count})
    lowering.operators.append(operator)
    return None


def _part(lowering: Lowering, value: ir.Value, whole: Stored) -> Tensor:
    """The tensor of one output of Split, bound to it."""
    dims = lowering.dims(value)
    shape = tuple(dims[axis] for axis in whole.layout)
    tensor = Tensor(str(value.name), shape, whole.tensor.dtype, batch_axis=whole.tensor.batch_axis)
    lowering.bind(value, tensor, whole.layout)
    return tensor


def _slice(lowering: Lowering, node: ir.Node) -> None:
    """SLICE, or STRIDED_SLICE where steps are not 1."""
    value, out = need(node.inputs[0]), node.outputs[0]
    dims, found = lowering.dims(value), lowering.stored(value)
    ranges = _ranges(lowering, node, dims)
    if lowering.has_batch(value) and ranges[0] != range(dims[0]):
        raise lowering.refuse(node, "it cuts the batch, whose size is free")
    if all(part == range(size) for part, size in zip(ranges, dims, strict=True)):
        return lowering.bind(out, found.tensor, found.layout)
    ordered = [ranges[axis] for axis in found.layout]
    if any(part.step < 0 for part in ordered):
        raise lowering.refuse(node, "a negative step; a Gather with the reversed indices can be written")
    if any(part.step > 1 for part in ordered):
        return _strided(lowering, out, found, ordered)
    begin = lowering.ints(f"{out.name}_begin", [part.start for part in ordered])
    batch = found.tensor.batch_axis
    lengths = [-1 if position == batch else len(part) for position, part in enumerate(ordered)]
    size = lowering.ints(f"{out.name}_size", lengths)
    lowering.emit_for("SLICE", [found.tensor, begin, size], out, found.layout)
    return None


def _ranges(lowering: Lowering, node: ir.Node, dims: Sequence[int]) -> list[range]:
    """What is kept along each axis, clamped as ONNX has it; the batch in full, whatever its size."""
    starts, ends, axes, steps = (_numbers(lowering, node, index) for index in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise lowering.refuse(node, "it has no starts or no ends")
    result = [range(size) for size in dims]
    free = lowering.has_batch(node.inputs[0])
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = 1 if steps is None else steps[i]
        axis %= len(dims)
        if axis == 0 and free:
            whole = starts[i] == 0 and ends[i] >= _OPEN >> 33 and step == 1  # some exporters write 2**31 - 1
            result[0] = range(dims[0]) if whole else range(0)
        else:
            result[axis] = range(*slice(starts[i], ends[i], step).indices(dims[axis]))
    return result


def _numbers(lowering: Lowering, node: ir.Node, index: int) -> list[int] | None:
    """A constant input of integers; None if it is absent."""
    value = input_at(node, index)
    if value is None:
        return None
    numbers = array(value)
    if numbers is None:
        raise lowering.refuse(node, f"its input {value.name!r} is computed; give a constant")
    return [int(number) for number in numbers.reshape(-1)]


def _strided(lowering: Lowering, out: ir.Value, found: Stored, ranges: Sequence[range]) -> None:
    batch = found.tensor.batch_axis
    mask = 0 if batch is None else 1 << batch
    inputs = [
        found.tensor,
        lowering.ints(f"{out.name}_begin", [part.start for part in ranges]),
        lowering.ints(f"{out.name}_end", [part.stop for part in ranges]),
        lowering.ints(f"{out.name}_strides", [part.step for part in ranges]),
    ]
    options = {"begin_mask": mask, "end_mask": mask, "ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0}
    lowering.emit_for("STRIDED_SLICE", inputs, out, found.layout, options=options)


def _pad(lowering: Lowering, node: ir.Node) -> None:
    """PAD with zeros, PADV2 with another number, MIRROR_PAD for reflections."""
    value, out = need(node.inputs[0]), node.outputs[0]
    mode, found = text_attribute(node, "mode", "constant"), lowering.stored(value)
    widths = _widths(lowering, node, len(found.layout))
    if mode not in ("constant", "reflect"):
        raise lowering.refuse(node, f"padding mode {mode!r}; constant and reflect can be written")
    if any(width < 0 for pair in widths for width in pair):
        raise lowering.refuse(node, f"negative padding {widths}; use a Slice")
    if lowering.has_batch(value) and widths[0] != (0, 0):
        raise lowering.refuse(node, "it pads the batch")
    table = np.array([widths[axis] for axis in found.layout], np.int32)
    inputs = [found.tensor, lowering.constant(f"{out.name}_widths", table)]
    if mode == "reflect":
        lowering.emit_for("MIRROR_PAD", inputs, out, found.layout, options={"mode": "REFLECT"})
        return
    filler = _filler(lowering, node)
    if filler:
        inputs.append(lowering.constant(f"{out.name}_filler", np.array([filler], np.float32)))
    lowering.emit_for("PADV2" if filler else "PAD", inputs, out, found.layout)


def _widths(lowering: Lowering, node: ir.Node, rank: int) -> list[tuple[int, int]]:
    """(before, after) by ONNX axis."""
    pads, axes = _numbers(lowering, node, 1), _numbers(lowering, node, 3)
    if pads is None:
        raise lowering.refuse(node, "it has no widths")
    chosen = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    result = [(0, 0)] * rank
    for i, axis in enumerate(chosen):
        result[axis] = (pads[i], pads[i + len(chosen)])
    return result


def _filler(lowering: Lowering, node: ir.Node) -> float:
    value = input_at(node, 2)
    if value is None:
        return 0.0
    numbers = array(value)
    if numbers is None or numbers.size != 1:
        raise lowering.refuse(node, f"its filling {value.name!r} is computed; give a constant")
    return float(numbers.reshape(()))


def _gather(lowering: Lowering, node: ir.Node) -> None:
    """Constant indices along one axis; the axes of the indices take its place."""
    value, out = need(node.inputs[0]), node.outputs[0]
    dims, indices = lowering.dims(value), array(node.inputs[1])
    axis = int_attribute(node, "axis", 0) % len(dims)
    _keep_batch(lowering, node, value, axis)
    if indices is None:
        raise lowering.refuse(node, f"its indices {need(node.inputs[1]).name!r} are computed; give a constant")
    found = lowering.stored(value)
    picked = lowering.constant(f"{out.name}_indices", np.asarray(indices % dims[axis], np.int32))
    options = {"axis": found.layout.index(axis), "batch_dims": 0}
    layout = _with_axes(found.layout, axis, indices.ndim)
    lowering.emit_for("GATHER", [found.tensor, picked], out, layout, options=options)


def _with_axes(layout: Layout, axis: int, count: int) -> Layout:
    """The layout after one axis has been replaced by ``count`` axes.

    >>> _with_axes((0, 2, 3, 1), 1, 0), _with_axes((0, 2, 1), 1, 2)
    ((0, 1, 2), (0, 3, 1, 2))
    """
    result: list[int] = []
    for other in layout:
        if other == axis:
            result += range(axis, axis + count)
        else:
            result.append(other + count - 1 if other > axis else other)
    return tuple(result)


def _cast(lowering: Lowering, node: ir.Node) -> None:
    value, out = need(node.inputs[0]), node.outputs[0]
    kinds = [DTYPES.get(v.dtype) if v.dtype is not None else None for v in (value, out)]
    if None in kinds:
        raise lowering.refuse(node, f"from {value.dtype} to {out.dtype}; known are {', '.join(DTYPES.values())}")
    found = lowering.stored(value)
    if kinds[0] == kinds[1]:
        return lowering.bind(out, found.tensor, found.layout)
    before, after = (_schema_type(kind) for kind in kinds if kind is not None)
    options = {"in_data_type": before, "out_data_type": after}
    lowering.emit_for("CAST", [found.tensor], out, found.layout, options=options)
    return None


def _schema_type(kind: DType) -> str:
    """The schema's name of an element type."""
    return kind.upper()


RULES: dict[str, Rule] = {
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
}
