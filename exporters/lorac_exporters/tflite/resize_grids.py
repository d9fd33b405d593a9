"""Which pixels of its input a resized image is made of, along one axis: by ONNX's rules, and by TFLite's."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
WAYS = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")  # coordinate_transformation_mode


@dataclasses.dataclass(frozen=True)
class Grid:
    """``before`` pixels become ``after``; ``scale`` and ``way`` (coordinate_transformation_mode) are ONNX's."""

    before: int
    after: int
    scale: float
    way: str


def onnx_positions(grid: Grid) -> npt.NDArray[np.float32]:
    """Where each pixel of the output lies in the input, in float32 as onnxruntime computes it.

    >>> onnx_positions(Grid(2, 4, 2.0, "half_pixel"))
    array([-0.25,  0.25,  0.75,  1.25], dtype=float32)

    Raises ValueError for an unknown ``way``.
    """
    out = np.arange(grid.after, dtype=np.float32)
    scale, half = np.float32(grid.scale), np.float32(0.5)
    if grid.way == "asymmetric":
        return out / scale
    if grid.way == "align_corners":
        steps = np.float32(max(grid.after - 1, 1))
        return out * np.float32(grid.before - 1) / steps
    if grid.way == "pytorch_half_pixel" and grid.after == 1:
        return np.zeros(1, np.float32)
    if grid.way in ("half_pixel", "pytorch_half_pixel"):
        return (out + half) / scale - half
    raise ValueError(f"unknown coordinate_transformation_mode {grid.way!r}")


def onnx_nearest(grid: Grid, rounding: str) -> Indices:
    """The pixel of the input that each pixel of the output copies; ``rounding`` is ONNX's nearest_mode.

    >>> onnx_nearest(Grid(2, 4, 2.0, "asymmetric"), "floor")
    array([0, 0, 1, 1])
    """
    x = onnx_positions(grid)
    half = np.float32(0.5)
    rounded = {
        "floor": np.floor(x),
        "ceil": np.ceil(x),
        "round_prefer_floor": np.ceil(x - half),
        "round_prefer_ceil": np.floor(x + half),
    }[rounding]
    return np.asarray(np.clip(rounded, 0, grid.before - 1), np.int64)


def tflite_nearest(grid: Grid, align_corners: bool, half_pixel_centers: bool) -> Indices:
    """The same for RESIZE_NEAREST_NEIGHBOR."""
    out = np.arange(grid.after, dtype=np.float32)
    x = (out + np.float32(0.5 if half_pixel_centers else 0)) * _step(grid, align_corners)
    rounded = np.floor(x + np.float32(0.5)) if align_corners else np.floor(x)
    return np.asarray(np.clip(rounded, 0, grid.before - 1), np.int64)


def onnx_linear(grid: Grid) -> Weights:
    """(after, before): the weight of each pixel of the input in each pixel of the output.

    >>> onnx_linear(Grid(2, 4, 2.0, "half_pixel"))[1]
    array([0.75, 0.25])
    """
    return _interpolation(grid, onnx_positions(grid))


def tflite_linear(grid: Grid, align_corners: bool, half_pixel_centers: bool) -> Weights:
    """The same for RESIZE_BILINEAR."""
    out, half = np.arange(grid.after, dtype=np.float32), np.float32(0.5)
    step = _step(grid, align_corners)
    return _interpolation(grid, (out + half) * step - half if half_pixel_centers else out * step)


def _step(grid: Grid, align_corners: bool) -> np.float32:
    """Pixels of the input per pixel of the output."""
    if align_corners and grid.after > 1:
        return np.float32(grid.before - 1) / np.float32(grid.after - 1)
    return np.float32(grid.before) / np.float32(grid.after)


def _interpolation(grid: Grid, positions: npt.NDArray[np.float32]) -> Weights:
    """Between the two pixels around each position; outside, the pixel at the border."""
    x = np.clip(positions.astype(np.float64), 0, grid.before - 1)
    low = np.floor(x).astype(np.int64)
    high = np.minimum(low + 1, grid.before - 1)
    weights = np.zeros((grid.after, grid.before))
    np.add.at(weights, (np.arange(grid.after), low), 1 - (x - low))
    np.add.at(weights, (np.arange(grid.after), high), x - low)
    return weights
