"""Resize: TFLite's own operators where they compute what ONNX says, found out by comparing the numbers.

TFLite knows three ways to map a pixel of the output to one of the input, ONNX six, with four ways to round.
For the sizes at hand many agree. Nearest neighbours that none gives are gathered row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, int_attribute, ints_attribute, name_of, text_attribute
from lorac_exporters.tflite.elementwise import alias
from lorac_exporters.tflite.lowering import Lowering, Rule
from lorac_exporters.tflite.network import Option, Tensor
from lorac_exporters.tflite.padding import bind_image, emit_image, image
from lorac_exporters.tflite.resize_grids import WAYS, Grid, onnx_linear, onnx_nearest, tflite_linear, tflite_nearest

# How TFLite places pixels: (align_corners, half_pixel_centers).
_WAYS = ((False, True), (False, False), (True, False))


def resize(lowering: Lowering, node: ir.Node) -> None:
    """Resize of height and width, nearest or linear."""
    if lowering.dims(node.inputs[0]) == lowering.dims(node.outputs[0]):
        alias(lowering, node)  # onnxruntime then copies, whatever the factors
        return
    grids = _grids(lowering, node)
    mode = text_attribute(node, "mode", "nearest")
    if mode == "nearest":
        _nearest(lowering, node, grids)
    elif mode == "linear":
        _linear(lowering, node, grids)
    else:
        raise lowering.refuse(node, f"mode {mode!r}, expected 'nearest' or 'linear'")


def _nearest(lowering: Lowering, node: ir.Node, grids: Sequence[Grid]) -> None:
    rounding = text_attribute(node, "nearest_mode", "round_prefer_floor")
    chosen = [onnx_nearest(grid, rounding) for grid in grids]
    for align, half in _WAYS:
        if all(np.array_equal(c, tflite_nearest(g, align, half)) for c, g in zip(chosen, grids, strict=True)):
            _emit(lowering, node, "RESIZE_NEAREST_NEIGHBOR", grids, _options(align, half))
            return
    _gather(lowering, node, grids, chosen)


def _linear(lowering: Lowering, node: ir.Node, grids: Sequence[Grid]) -> None:
    if int_attribute(node, "antialias", 0) and any(grid.after < grid.before for grid in grids):
        raise lowering.refuse(node, "it smooths while shrinking (antialias)")
    weights = [onnx_linear(grid) for grid in grids]
    for align, half in _WAYS:
        if all(_close(w, tflite_linear(g, align, half)) for w, g in zip(weights, grids, strict=True)):
            _emit(lowering, node, "RESIZE_BILINEAR", grids, _options(align, half))
            return
    sizes = " and ".join(f"{grid.before} to {grid.after}" for grid in grids)
    way = f"coordinate_transformation_mode {grids[0].way!r}"
    raise lowering.refuse(node, f"TFLite places pixels in another way than {way} does for {sizes} pixels")


def _close(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> bool:
    """Equal but for rounding: positions are float32, so they are the coarser the more pixels there are."""
    return bool(np.abs(one - other).max() <= 4 * np.finfo(np.float32).eps * one.shape[1])


def _options(align: bool, half: bool) -> dict[str, Option]:
    return {"align_corners": align, "half_pixel_centers": half}


def _emit(lowering: Lowering, node: ir.Node, kind: str, grids: Sequence[Grid], options: dict[str, Option]) -> None:
    output = node.outputs[0]
    size = lowering.ints(f"{name_of(output)}_size", [grid.after for grid in grids])
    emit_image(lowering, kind, [image(lowering, node.inputs[0]), size], output, options)


def _gather(lowering: Lowering, node: ir.Node, grids: Sequence[Grid], chosen: Sequence[npt.NDArray[np.int64]]) -> None:
    """Rows, then columns, by their numbers."""
    made, name = image(lowering, node.inputs[0]), name_of(node.outputs[0])
    for axis, (grid, indices) in enumerate(zip(grids, chosen, strict=True), start=1):
        if not np.array_equal(indices, np.arange(grid.before)):
            made = _gathered(lowering, made, axis, indices, name)
    bind_image(lowering, made, node.outputs[0])


def _gathered(lowering: Lowering, data: Tensor, axis: int, indices: npt.NDArray[np.int64], name: str) -> Tensor:
    shape = [len(indices) if i == axis else size for i, size in enumerate(data.shape)]
    inputs = [data, lowering.ints(f"{name}_pixels", indices.tolist())]
    options: dict[str, Option] = {"axis": axis}
    return lowering.emit(
        "GATHER", inputs, shape, name=f"{name}_axis{axis}", options=options, batch_axis=data.batch_axis
    )


def _grids(lowering: Lowering, node: ir.Node) -> tuple[Grid, Grid]:
    """Height and width.

    Raises ConversionError if another axis is resized, or if the sizes or the region are not constants.
    """
    before, after = lowering.dims(node.inputs[0]), lowering.dims(node.outputs[0])
    if len(before) not in (3, 4) or before[:2] != after[:2]:
        raise lowering.refuse(node, f"from {before} to {after}: only height and width can be resized")
    way = text_attribute(node, "coordinate_transformation_mode", "half_pixel")
    if way not in WAYS:
        raise lowering.refuse(node, f"coordinate_transformation_mode {way!r}, expected one of {', '.join(WAYS)}")
    if text_attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise lowering.refuse(node, "it keeps the aspect ratio (keep_aspect_ratio_policy)")
    scales = dict(_scales(lowering, node))
    grids = [Grid(before[a], after[a], scales.get(a, after[a] / before[a]), way) for a in range(2, len(before))]
    return (Grid(1, 1, 1.0, way) if len(grids) == 1 else grids[0]), grids[-1]


def _scales(lowering: Lowering, node: ir.Node) -> Iterator[tuple[int, float]]:
    """(axis, factor) where the node gives factors; they need not be the quotient of the sizes."""
    scales = input_at(node, 2)
    if scales is None:
        return
    factors = array(scales)
    if factors is None:
        raise lowering.refuse(node, f"its scales {name_of(scales)!r} are computed, expected constants")
    rank = len(lowering.dims(node.inputs[0]))
    axes = ints_attribute(node, "axes", range(rank))
    if factors.size:
        yield from ((axis % rank, float(factor)) for axis, factor in zip(axes, factors, strict=True))


RULES: dict[str, Rule] = {"Resize": resize}
