"""MaxPool and AveragePool: windows where TFLite's padding is ONNX's, else cells added by PAD.

A maximum must never choose an added cell: it holds zero where no number is negative, else the lowest float.
An average counts the cells that it was told to count: PAD makes it count all, a constant factor puts that right.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, int_attribute, name_of
from lorac_exporters.tflite.lowering import Lowering, Rule
from lorac_exporters.tflite.network import Option, Tensor
from lorac_exporters.tflite.padding import (
    LOWEST,
    Axes,
    Axis,
    Mode,
    emit_image,
    enlarged,
    image,
    padded,
    padding_of,
    strides_of,
    window_axes,
)
from lorac_exporters.tflite.reductions import reduce


def max_pool(lowering: Lowering, node: ir.Node) -> None:
    """MaxPool without dilation, and without the places of the maxima."""
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise lowering.refuse(node, "its second output, the places of the maxima, is used")
    axes = _pool_axes(lowering, node)
    fill = 0.0 if is_nonnegative(node.inputs[0]) else LOWEST
    data, padding = padded(lowering, image(lowering, node.inputs[0]), axes, fill=fill)
    emit_image(lowering, "MAX_POOL_2D", [data], node.outputs[0], _options(axes, padding))


def average_pool(lowering: Lowering, node: ir.Node) -> None:
    """AveragePool; over a whole image it is a mean."""
    axes = _pool_axes(lowering, node)
    counting = bool(int_attribute(node, "count_include_pad", 0))
    if counting and any(axis.needed[1] > axis.after for axis in axes):
        raise lowering.refuse(node, "releases of onnxruntime disagree on windows beyond the padding that counts")
    if all(axis.kernel == axis.size and axis.count == 1 and axis.before == 0 for axis in axes):
        reduce(lowering, node, range(2, len(lowering.dims(node.inputs[0]))), keep=True)
        return
    data, output = image(lowering, node.inputs[0]), node.outputs[0]
    factors = _factors(axes, include_pads=counting)
    if padding_of(axes) == "SAME" and np.array_equal(factors, _factors(axes, include_pads=False)):
        emit_image(lowering, "AVERAGE_POOL_2D", [data], output, _options(axes, "SAME"))
        return
    if padding_of(axes) != "VALID":
        data = enlarged(lowering, data, axes)
    if np.all(factors == 1):
        emit_image(lowering, "AVERAGE_POOL_2D", [data], output, _options(axes, "VALID"))
        return
    made = _averages(lowering, data, axes, name_of(output))
    correction = lowering.constant(f"{name_of(output)}_factors", factors[None, :, :, None])
    emit_image(lowering, "MUL", [made, correction], output, {"fused_activation_function": "NONE"})


def _pool_axes(lowering: Lowering, node: ir.Node) -> Axes:
    """Raises ConversionError for windows with gaps, and for those that hold nothing but padding."""
    axes = window_axes(lowering, node)
    if any(axis.dilation != 1 for axis in axes):
        raise lowering.refuse(node, "its window has gaps (dilations other than 1)")
    if any(np.any(_counted(axis, include_pads=False) == 0) for axis in axes):
        raise lowering.refuse(node, "one of its windows lies outside the image; PyTorch and ONNX disagree on it")
    return axes


def is_nonnegative(value: ir.Value | None) -> bool:
    """Whether no number of a value can be below zero, by what computes it."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type in _PASSING:
        return all(is_nonnegative(used) for used in node.inputs if array(used) is None)
    if node.op_type == "Clip":
        low = array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and float(low) >= 0
    return node.op_type in _NONNEGATIVE


def _averages(lowering: Lowering, data: Tensor, axes: Axes, name: str) -> Tensor:
    shape = (data.shape[0], axes[0].count, axes[1].count, data.shape[-1])
    return lowering.emit(
        "AVERAGE_POOL_2D",
        [data],
        shape,
        name=f"{name}_uncorrected",
        options=_options(axes, "VALID"),
        batch_axis=data.batch_axis,
    )


def _factors(axes: Axes, *, include_pads: bool) -> npt.NDArray[np.float32]:
    """(height, width): cells of a window / cells that ONNX counts, for each window."""
    rows, columns = (_counted(axis, include_pads=include_pads) for axis in axes)
    cells, counted = axes[0].kernel * axes[1].kernel, np.outer(rows, columns)
    return np.asarray(cells / counted, np.float32)


def _counted(axis: Axis, *, include_pads: bool) -> npt.NDArray[np.int64]:
    """How many cells of each window along one axis count: those inside, or also those that ONNX pads."""
    starts = np.arange(axis.count) * axis.stride - axis.before
    low, high = (-axis.before, axis.size + axis.after) if include_pads else (0, axis.size)
    cells = np.minimum(starts + axis.kernel, high) - np.maximum(starts, low)
    return np.asarray(np.maximum(cells, 0), np.int64)


def _options(axes: Axes, padding: Mode) -> dict[str, Option]:
    window: dict[str, Option] = {"filter_height": axes[0].kernel, "filter_width": axes[1].kernel}
    return {"padding": padding, **strides_of(axes), **window}


_NONNEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs", "Sqrt", "ReduceL2"})
_PASSING = frozenset(
    {
        "AveragePool",
        "Concat",
        "Dropout",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Transpose",
    }
)
RULES: dict[str, Rule] = {"AveragePool": average_pool, "MaxPool": max_pool}
