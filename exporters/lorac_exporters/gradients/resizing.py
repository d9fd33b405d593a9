"""Gradient rules: Resize, DepthToSpace and SpaceToDepth.

Interpolation is a linear map along one axis after another; its gradient is the transposed map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.gradients.moves import Floats, Grads, constant_input, contract, only, refuse, reshape
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import float_attribute, int_attribute, ints_attribute, text_attribute

_HALF = np.float32(0.5)


def resize(tape: Tape, site: Site) -> Grads:
    """The transposed interpolation, axis by axis; where cells are just repeated, the sum over their copies."""
    matrices = _matrices(site)
    blocks = {axis: _copies(matrix) for axis, matrix in matrices.items()}
    if all(blocks.values()) and min(matrices, default=2) >= 2:
        kernel = [blocks.get(axis) or 1 for axis in range(2, len(dims(site.x)))]
        return only(site, _block_sums(tape, site, kernel))
    grad = site.grad
    for axis in sorted(matrices, reverse=True):
        grad = contract(tape, grad, axis, matrices[axis])
    return only(site, grad)


def _copies(matrix: Floats) -> int:
    """How often each input cell is repeated, 0 if that is not all that a matrix (outputs, inputs) does."""
    outputs, inputs = matrix.shape
    times = outputs // inputs
    return times if np.array_equal(matrix, np.repeat(np.eye(inputs, dtype=np.float32), times, axis=0)) else 0


def _block_sums(tape: Tape, site: Site, kernel: list[int]) -> ir.Value:
    """Sums over blocks as means times their size: onnxruntime pools fast."""
    if math.prod(kernel) == 1:
        return site.grad
    window = {"kernel_shape": kernel, "strides": kernel}
    mean = tape.op("AveragePool", site.grad, like=site.x, attributes=window)
    return tape.op("Mul", mean, float(math.prod(kernel)), like=site.x)


def _matrices(site: Site) -> dict[int, Floats]:
    """For each axis that changes, (outputs, inputs): what each input cell counts in each output."""
    if int_attribute(site.node, "antialias", 0):
        raise refuse(site, "antialiasing")
    if dims(site.x)[1:] == dims(site.y)[1:]:
        return {}  # onnxruntime then copies, whatever the factors
    found = {}
    for axis, scale in _scales(site).items():
        size = sizes(site.x, axis)[0]
        cells = _coordinates(site, scale, size, sizes(site.y, axis)[0])
        found[axis] = _interpolation(site, cells, size)
    return found


def _scales(site: Site) -> dict[int, np.float32]:
    """The factor of each axis that changes."""
    pairs = list(zip(dims(site.x), dims(site.y), strict=True))
    given = constant_input(site, 2, "scales")
    if given is not None and given.size:
        axes = ints_attribute(site.node, "axes", range(len(pairs)))
        factors = zip(axes, given, strict=True)
        return {axis % len(pairs): np.float32(scale) for axis, scale in factors if scale != 1}
    if text_attribute(site.node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refuse(site, "it keeps the aspect ratio")
    known = [(axis, *pair) for axis, pair in enumerate(pairs) if pair[0] != pair[1]]
    ints = [(axis, n, out) for axis, n, out in known if isinstance(n, int) and isinstance(out, int)]
    return {axis: np.float32(out) / np.float32(n) for axis, n, out in ints}


def _coordinates(site: Site, scale: np.float32, size: int, outputs: int) -> Floats:
    """Where each output cell of an axis lies among its input cells.

    In float32 as in onnxruntime, since a rounding in the last place may decide which cell is the nearest.
    """
    mode = text_attribute(site.node, "coordinate_transformation_mode", "half_pixel")
    cells = np.arange(outputs, dtype=np.float32)
    if mode == "asymmetric":
        return cells / scale
    if mode == "align_corners":
        return cells * np.float32(size - 1) / np.float32(max(outputs - 1, 1))
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and outputs > 1):
        return (cells + _HALF) / scale - _HALF
    if mode == "pytorch_half_pixel":
        return cells * 0
    raise refuse(site, f"coordinate_transformation_mode {mode!r}")


def _interpolation(site: Site, cells: Floats, size: int) -> Floats:
    """(outputs, size): what each input cell counts at each of the points ``cells``."""
    mode = text_attribute(site.node, "mode", "nearest")
    if mode == "linear":
        return _linear(cells, size)
    if mode == "cubic":
        return _cubic(site, cells, size)
    if mode == "nearest":
        return _nearest(site, cells, size)
    raise refuse(site, f"mode {mode!r}")


def _nearest(site: Site, cells: Floats, size: int) -> Floats:
    mode = text_attribute(site.node, "nearest_mode", "round_prefer_floor")
    if mode not in _ROUNDINGS:
        raise refuse(site, f"nearest_mode {mode!r}")
    return _weighted(_ROUNDINGS[mode](cells)[:, None], np.ones((len(cells), 1)), size)


def _linear(cells: Floats, size: int) -> Floats:
    left = np.floor(cells)
    share = cells - left
    return _weighted(np.stack([left, left + 1], 1), np.stack([1 - share, share], 1), size)


def _cubic(site: Site, cells: Floats, size: int) -> Floats:
    """Four cells around each point, weighed by Keys' cubic polynomial."""
    a = float_attribute(site.node, "cubic_coeff_a", -0.75)
    sources = np.floor(cells)[:, None] + np.arange(-1, 3, dtype=np.float32)
    d = np.abs(cells[:, None] - sources).astype(np.float64)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    shares = np.where(d <= 1, near, far)
    if int_attribute(site.node, "exclude_outside", 0):
        shares = np.where((sources >= 0) & (sources < size), shares, 0)
        shares /= shares.sum(1, keepdims=True)
    return _weighted(sources, shares, size)


def _weighted(sources: npt.NDArray[np.floating], shares: npt.NDArray[np.floating], size: int) -> Floats:
    """(outputs, size) from (outputs, k) sources and shares; sources beyond the border count for the border."""
    matrix = np.zeros((len(sources), size))
    clipped = np.clip(sources, 0, size - 1).astype(np.int64)
    np.add.at(matrix, (np.arange(len(sources))[:, None], clipped), shares)
    return matrix.astype(np.float32)


_ROUNDINGS: dict[str, Callable[[Floats], Floats]] = {
    "floor": lambda x: np.floor(x),
    "ceil": lambda x: np.ceil(x),
    "round_prefer_floor": lambda x: np.ceil(x - _HALF),
    "round_prefer_ceil": lambda x: np.floor(x + _HALF),
}


def depth_to_space(tape: Tape, site: Site) -> Grads:
    """SpaceToDepth undoes it; in mode CRD (PixelShuffle) the order of channels differs."""
    block = int_attribute(site.node, "blocksize", 1)
    if text_attribute(site.node, "mode", "DCR") == "DCR":
        return only(site, tape.op("SpaceToDepth", site.grad, like=site.x, attributes={"blocksize": block}))
    batch, (depth, high, wide) = dims(site.y)[0], sizes(site.y, 1)
    rows, columns = high // block, wide // block
    apart = reshape(tape, site.grad, (batch, depth, rows, block, columns, block))
    turned = (batch, depth, block, block, rows, columns)
    result = tape.op("Transpose", apart, shape=turned, attributes={"perm": [0, 1, 3, 5, 2, 4]})
    return only(site, reshape(tape, result, dims(site.x)))


def space_to_depth(tape: Tape, site: Site) -> Grads:
    """DepthToSpace undoes it."""
    block = int_attribute(site.node, "blocksize", 1)
    return only(site, tape.op("DepthToSpace", site.grad, like=site.x, attributes={"blocksize": block}))


RULES: dict[str, Rule] = {
    "DepthToSpace": depth_to_space,
    "Resize": resize,
    "SpaceToDepth": space_to_depth,
}
