"""What gradient rules are made of: checks, moves of values, and linear maps along an axis.

Of a shape at most one size is symbolic (the batch), so a Reshape to a known shape needs a single -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.gradients.rule import Site
from lorac_exporters.gradients.tape import Dim, Dims, Tape, dims
from lorac_exporters.graph_tools import Array, array, describe
from lorac_runtime.errors import ConversionError

Floats = npt.NDArray[np.float32]
Grads = Sequence["ir.Value | None"]
Pads = dict[int, tuple[int, int]]  # axis: cells before, cells after; negative ones cut


def only(site: Site, grad: ir.Value) -> Grads:
    """The gradient of the first input, and none for the others."""
    return [grad, *[None] * (len(site.node.inputs) - 1)]


def refuse(site: Site, why: str) -> ConversionError:
    """The error for a form of an operator that has no rule."""
    return ConversionError(f"{describe(site.node)} has no gradient here: {why}; train fewer layers or replace it")


def constant_input(site: Site, index: int, what: str) -> Array | None:
    """The numbers of an optional input. Raises ConversionError if they are computed by the graph."""
    value = site.input(index)
    numbers = array(value)
    if value is not None and numbers is None:
        raise refuse(site, f"its {what} are computed by the graph, expected constants")
    return numbers


def needed_ints(site: Site, index: int, what: str) -> list[int]:
    """A constant input of integers. Raises ConversionError if it is absent or computed."""
    numbers = constant_input(site, index, what)
    if numbers is None:
        raise refuse(site, f"its {what} are absent")
    return [int(number) for number in numbers.reshape(-1)]


def axis_size(site: Site, value: ir.Value, axis: int) -> int:
    """The size of an axis. Raises ConversionError if it is symbolic."""
    size = dims(value)[axis]
    if not isinstance(size, int):
        raise refuse(site, f"it works along axis {axis}, whose size is not known ({size})")
    return size


def reshape(tape: Tape, value: ir.Value, shape: Sequence[Dim]) -> ir.Value:
    """Reshape to known sizes, of which at most one is symbolic; nothing if the shape is the same.

    Raises ConversionError if several are.
    """
    numbers = [size if isinstance(size, int) else -1 for size in shape]
    if numbers.count(-1) > 1:
        raise ConversionError(f"cannot reshape to {tuple(shape)}: several sizes are not known")
    if tuple(shape) == dims(value):
        return value
    return tape.op("Reshape", value, tape.ints(*numbers), shape=shape, dtype=value.dtype)


def zeros_like(tape: Tape, value: ir.Value) -> ir.Value:
    """Zeros of the shape of a value, which may be symbolic."""
    sizes = tape.op("Shape", value, shape=(len(dims(value)),), dtype=ir.DataType.INT64)
    return tape.op("ConstantOfShape", sizes, like=value)


def pad(tape: Tape, value: ir.Value, widths: Pads) -> ir.Value:
    """Zeros around a value; negative widths cut."""
    widths = {axis: width for axis, width in widths.items() if any(width)}
    if not widths:
        return value
    shape = list(dims(value))
    for axis, (before, after) in widths.items():
        size = shape[axis]
        assert isinstance(size, int)
        shape[axis] = size + before + after
    rank = len(shape)
    starts, ends = ([widths.get(axis, (0, 0))[side] for axis in range(rank)] for side in (0, 1))
    return tape.op("Pad", value, tape.ints(*starts, *ends), shape=shape)


def contract(tape: Tape, value: ir.Value, axis: int, matrix: Floats) -> ir.Value:
    """Replace an axis by a linear map of it: y[.., j, ..] = sum over i of value[.., i, ..] * matrix[i, j]."""
    shape = dims(value)
    result = (*shape[:axis], matrix.shape[1], *shape[axis + 1 :])
    if axis == len(shape) - 1:
        return tape.op("MatMul", value, tape.constant(matrix), shape=result)
    if axis < len(shape) - 2:
        value = reshape(tape, value, (*shape[: axis + 1], product(shape[axis + 1 :])))
    between = (*shape[:axis], matrix.shape[1], product(shape[axis + 1 :]))
    left = tape.constant(np.ascontiguousarray(matrix.T))
    return reshape(tape, tape.op("MatMul", left, value, shape=between), result)


def product(shape: Dims) -> Dim:
    """The number of elements; symbolic if one of the sizes is."""
    return int(np.prod([d for d in shape if isinstance(d, int)])) if all(isinstance(d, int) for d in shape) else None


def one_hot(indices: npt.NDArray[np.int64], size: int) -> Floats:
    """(len(indices), size): row i is one at indices[i], so that contracting with it adds up what was gathered."""
    matrix = np.zeros((len(indices), size), np.float32)
    matrix[np.arange(len(indices)), indices] = 1
    return matrix
