"""Bring tensors into one order of axes, so that operators can broadcast over what is stored."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.graph_tools import array, need
from lorac_exporters.tflite.lowering import Layout, Lowering, Stored, channels_last, plain
from lorac_exporters.tflite.network import Tensor


def reshaped(
    lowering: Lowering, tensor: Tensor, shape: Sequence[int], batch_axis: int | None, *, name: str = ""
) -> Tensor:
    """``tensor`` in another shape by a RESHAPE, the batch free (-1); the tensor itself where that is its shape."""
    wanted = tuple(shape)
    if wanted == tensor.shape and batch_axis == tensor.batch_axis:
        return tensor
    label = name or f"{tensor.name}_reshaped"
    target = lowering.ints(f"{label}_shape", [-1 if i == batch_axis else size for i, size in enumerate(wanted)])
    return lowering.emit("RESHAPE", [tensor, target], wanted, name=label, dtype=tensor.dtype, batch_axis=batch_axis)


def real_axes(lowering: Lowering, value: ir.Value) -> frozenset[int]:
    """Axes that order numbers: all but those of size 1; the batch is one of them."""
    dims = lowering.dims(value)
    batch = {0} if lowering.has_batch(value) else set()
    return frozenset(axis for axis, size in enumerate(dims) if size != 1) | batch


def completed(layout: Layout, rank: int, real: frozenset[int]) -> Layout:
    """A layout of ``rank`` axes whose real axes lie as in ``layout``: channels-last if that is one, else plain.

    Axes of size 1 may lie anywhere; where neither fits, each follows the axis before it.

    >>> completed((0, 1), 4, frozenset({0, 1})), completed((0, 2, 1), 3, frozenset({0, 1, 2}))
    ((0, 2, 3, 1), (0, 2, 1))
    """
    order = [axis for axis in layout if axis in real]
    for candidate in (channels_last(rank), plain(rank)):
        if [axis for axis in candidate if axis in real] == order:
            return candidate
    result = list(order)
    for axis in range(rank):
        if axis not in real:
            result.insert(result.index(axis - 1) + 1 if axis else 0, axis)
    return tuple(result)


def moved(lowering: Lowering, found: Stored, real: frozenset[int], dims: Sequence[int], layout: Layout) -> Tensor:
    """The tensor of ``found`` in the order of ``layout``, which may hold more axes of size 1.

    ``dims`` are sizes by axis; leading ones are left out. A TRANSPOSE where real axes must change places, a RESHAPE
    where only ones do.
    """
    tensor, wanted = found.tensor, [axis for axis in layout if axis in real]
    if [axis for axis in found.layout if axis in real] != wanted:
        kept = tuple(axis for axis in layout if axis in found.layout)
        tensor = lowering.transposed(found, kept)
    batch = None if tensor.batch_axis is None else layout.index(0)
    shape = tuple(dims[axis] for axis in layout)
    surplus = len(shape) - len(tensor.shape)
    if surplus > 0 and shape[surplus:] == tensor.shape and batch is None:
        return tensor
    return reshaped(lowering, tensor, shape, batch)


def operand(lowering: Lowering, value: ir.Value, layout: Layout) -> Tensor:
    """A value as an operand of a broadcasting operator whose result is stored in ``layout``.

    Axes missing on the left count as ones, as ONNX has it. A constant is reordered now and costs nothing.
    """
    dims = lowering.dims(value)
    surplus = len(layout) - len(dims)
    if array(value) is not None:
        return constant_operand(lowering, value, (1,) * surplus + dims, layout)
    found = lowering.stored(value)
    shifted = Stored(found.tensor, tuple(axis + surplus for axis in found.layout))
    real = frozenset(axis + surplus for axis in real_axes(lowering, value))
    return moved(lowering, shifted, real, (1,) * surplus + dims, layout)


def constant_operand(lowering: Lowering, value: ir.Value, dims: Sequence[int], layout: Layout) -> Tensor:
    """An initializer viewed as of the sizes ``dims``, in the order of ``layout``.

    Axes of size 1 that would lie in front are left out, all but the last.
    """
    order = list(layout)
    while len(order) > 1 and dims[order[0]] == 1:
        order.pop(0)
    kept = sorted(order)
    return lowering.arranged(value, [dims[axis] for axis in kept], [kept.index(axis) for axis in order])


def common_layout(lowering: Lowering, values: Sequence[ir.Value], rank: int) -> Layout:
    """The order in which most numbers of these values lie already; channels-last among equals."""
    computed = [need(value) for value in values if array(value) is None]
    if not computed:
        return plain(rank)
    return max((_rated(lowering, value, rank) for value in computed), key=lambda rated: rated[0])[1]


def _rated(lowering: Lowering, value: ir.Value, rank: int) -> tuple[tuple[int, int, bool], Layout]:
    found = lowering.stored(value)
    surplus = rank - len(found.layout)
    layout = (*range(surplus), *(axis + surplus for axis in found.layout))
    if surplus:
        layout = completed(layout, rank, frozenset(axis + surplus for axis in real_axes(lowering, value)))
    elements = 1
    for size in found.tensor.shape:
        elements *= size
    return (len(found.layout), elements, layout == channels_last(rank)), layout
