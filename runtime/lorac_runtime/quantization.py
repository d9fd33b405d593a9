"""The int8 formulas of weights and biases, written once: exporting and fusing on a device give the same bytes.

A stored weight q stands for ``scale * q``, symmetric (-127 to 127), with one scale for each output channel or one for
the whole tensor. A stored bias is int32 and stands for ``scale * input_scale * q``, where ``input_scale`` is the scale
of the layer's input activation, so that it can be added to the layer's integer sums as it is.

Per channel, every number depends on its own channel only: blocks of output channels give the bits that the whole
tensor gives. For one scale per tensor, take `peaks` of the blocks, join them with ``np.maximum``, then `scales_of`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

WEIGHT_LIMIT = 127
BIAS_LIMIT = 2.0**30  # half of int32: sums of products and bias share 32 bits
SMALLEST_STEP = 2.0**-28  # of integer sums; a channel of zeros needs some scale that runtimes accept
INT32 = np.iinfo(np.int32)


def weight_scales(weight: Array, axis: int | None, bias: Array | None, input_scale: float) -> Floats:
    """Scales (channels,) along ``axis`` of a weight, or (1,) for the whole tensor if ``axis`` is None; float32.

    The largest magnitude of a channel becomes 127, unless its bias (channels,) would then not fit into int32.

    >>> weight_scales(np.array([[2.54, -1.0], [0.0, 1.27]]), 0, None, 0.1)
    array([0.02, 0.01], dtype=float32)

    Raises ValueError for numbers that are not finite, and for an ``input_scale`` that is not positive.
    """
    bias_peaks = None if bias is None else peaks(bias, None if axis is None else 0)
    return scales_of(peaks(weight, axis), bias_peaks, input_scale)


def peaks(values: Array, axis: int | None) -> Floats:
    """Largest magnitude for each index along ``axis``, (channels,); of all values, (1,), if ``axis`` is None.

    >>> peaks(np.array([[1.0, -3.0], [0.0, 2.0]]), 1)
    array([1., 3.], dtype=float32)
    """
    others = tuple(i for i in range(values.ndim) if axis is None or i != axis % values.ndim)
    largest = np.maximum(np.max(values, axis=others, initial=0.0), -np.min(values, axis=others, initial=0.0))
    return np.asarray(largest, np.float32).reshape(-1)


def scales_of(weight_peaks: Floats, bias_peaks: Floats | None, input_scale: float) -> Floats:
    """What `weight_scales` gives for a weight and a bias with these `peaks`, each (channels,) or (1,).

    >>> scales_of(np.float32([254, 127]), np.float32([1.0, 2.0**32]), 1.0)
    array([2., 4.], dtype=float32)

    Raises ValueError for numbers that are not finite, and for an ``input_scale`` that is not positive.
    """
    if not (input_scale > 0 and math.isfinite(input_scale)):
        raise ValueError(f"the scale of a layer's input must be positive and finite, got {input_scale}")
    needed = [weight_peaks] if bias_peaks is None else [weight_peaks, bias_peaks]
    if not all(np.all(np.isfinite(p)) for p in needed):
        raise ValueError("a weight or bias holds numbers that are not finite; they have no int8 form")
    scales = np.maximum(weight_peaks.astype(np.float64) / WEIGHT_LIMIT, SMALLEST_STEP / input_scale)
    if bias_peaks is not None:
        scales = np.maximum(scales, bias_peaks.astype(np.float64) / (input_scale * BIAS_LIMIT))
    return np.asarray(scales, np.float32)


def quantized_weight(weight: Array, scales: Floats, axis: int | None) -> npt.NDArray[np.int8]:
    """The stored int8 numbers of a weight, in its own shape; ``scales`` and ``axis`` as in `weight_scales`.

    >>> quantized_weight(np.float32([[2.54, -1.0], [0.0, 1.27]]), np.float32([0.02, 0.01]), 0)
    array([[127, -50],
           [  0, 127]], dtype=int8)
    """
    steps = np.asarray(weight, np.float32) / _along(scales, weight.ndim, axis)
    np.rint(steps, out=steps)
    np.clip(steps, -WEIGHT_LIMIT, WEIGHT_LIMIT, out=steps)
    return steps.astype(np.int8)


def bias_scales(scales: Floats, input_scale: float) -> Floats:
    """Scales of the bias that belongs to a weight with ``scales``; float32 of the same shape.

    >>> bias_scales(np.float32([0.5, 0.25]), 0.5)
    array([0.25 , 0.125], dtype=float32)
    """
    return (scales.astype(np.float64) * input_scale).astype(np.float32)


def quantized_bias(bias: Array, scales: Floats) -> tuple[npt.NDArray[np.int32], int]:
    """The stored int32 numbers of a bias (channels,) for the `bias_scales`, and how many did not fit into 32 bits.

    >>> quantized_bias(np.array([1.0, -0.5]), np.float32([0.25, 0.125]))
    (array([ 4, -4], dtype=int32), 0)
    """
    steps = np.rint(np.asarray(bias, np.float64) / scales)
    saturated = int(np.count_nonzero((steps > INT32.max) | (steps < INT32.min)))
    return np.clip(steps, INT32.min, INT32.max).astype(np.int32), saturated


def _along(scales: Floats, ndim: int, axis: int | None) -> Floats:
    """``scales`` shaped so that it broadcasts along ``axis`` of a tensor with ``ndim`` axes."""
    if axis is None:
        return scales.reshape((1,) * ndim)
    return scales.reshape(tuple(-1 if i == axis % ndim else 1 for i in range(ndim)))
