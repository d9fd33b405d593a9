"""Batch normalisation as arithmetic on weights: into a convolution, and from one set of statistics to another.

With g = gamma / sqrt(var + eps) per output channel, ``BN(conv(x, W) + c)`` is
``conv(x, g * W) + (c - mean) * g + beta``. Rows of a low-rank factor ``lora_b`` scale along with their output
channel, in both layouts, because each of its c_out * k_h rows belongs to exactly one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def fold_factor(gamma: Array, var: Array, eps: float) -> Doubles:
    """g = gamma / sqrt(var + eps), each (c_out,); computed and returned in float64.

    >>> fold_factor(np.array([2.0]), np.array([3.0]), 1.0)
    array([1.])

    Raises ValueError where var + eps is not positive.
    """
    spread = np.asarray(var, np.float64).reshape(-1) + eps
    if not np.all(spread > 0):
        raise ValueError(f"a running variance must not be negative, got {float(np.min(spread)) - eps}")
    return np.asarray(gamma, np.float64).reshape(-1) / np.sqrt(spread)


def fold_conv(
    weight: Array,  # (c_out, c_in/groups, k_h, k_w) or (c_out, c_in/groups, k)
    bias: Array | None,  # (c_out,)
    gamma: Array,
    beta: Array,
    mean: Array,
    var: Array,
    eps: float,
) -> tuple[Floats, Floats]:
    """Weight and bias of the convolution that does what convolution + batch normalisation did; float32.

    >>> one = np.ones(1, np.float32)
    >>> weight, bias = fold_conv(np.ones((1, 1, 1, 1)), None, 2 * one, one, 3 * one, one, 0.0)
    >>> weight.ravel(), bias
    (array([2.], dtype=float32), array([-5.], dtype=float32))

    Raises ValueError where var + eps is not positive.
    """
    factor = fold_factor(gamma, var, eps)
    return fold_rows(weight, factor), fold_bias(bias, factor, beta, mean)


def fold_rows(weight: Array, factor: Array) -> Floats:
    """``weight`` (c_out, ...) with each output channel times its factor (c_out,); float32.

    >>> fold_rows(np.ones((2, 1, 1)), np.array([1.0, 3.0])).ravel()
    array([1., 3.], dtype=float32)
    """
    folded = np.asarray(weight) * factor.reshape(-1, *[1] * (np.ndim(weight) - 1))
    return folded.astype(np.float32, copy=False)


def fold_bias(bias: Array | None, factor: Array, beta: Array, mean: Array) -> Floats:
    """(bias - mean) * factor + beta, each (c_out,); no bias counts as zeros; float32.

    Without bias this is also the shift of a batch normalisation that stands alone.

    >>> fold_bias(None, np.array([2.0]), np.array([1.0]), np.array([3.0]))
    array([-5.], dtype=float32)
    """
    start = 0.0 if bias is None else np.asarray(bias, np.float64).reshape(-1)
    shifted = start - np.asarray(mean, np.float64).reshape(-1)
    return (shifted * factor + np.asarray(beta, np.float64).reshape(-1)).astype(np.float32)


def scale_rows(lora_b: Array, factor: Array, k_h: int) -> Floats:
    """``lora_b`` (c_out * k_h, rank) of an unfolded adapter, for the folded weight; float32.

    Exact in both layouts; scaling by 1 / factor undoes it where no factor is near zero.

    >>> scale_rows(np.ones((4, 1)), np.array([1.0, 3.0]), 2).ravel()
    array([1., 1., 3., 3.], dtype=float32)

    Raises ValueError if the rows are not k_h per output channel.
    """
    if lora_b.shape[0] != factor.size * k_h:
        raise ValueError(f"lora_b has {lora_b.shape[0]} rows, expected {factor.size} output channels * k_h {k_h}")
    return fold_rows(lora_b, np.repeat(factor, k_h))


def refold_weight(
    folded: Array,  # (c_out, c_in/groups, k_h, k_w), the unfolded weight times `old`
    old: Array,  # (c_out,)
    new: Array,  # (c_out,)
    rows: Array | None = None,  # (n, c_in/groups, k_h, k_w), unfolded
    row_index: Array | None = None,  # (n,)
) -> Floats:
    """A folded weight expressed with the factors ``new`` instead of ``old``; with ``new`` = 1, unfolded.

    Where ``old`` is near zero there is no way back from the folded weight: those rows are given unfolded.

    >>> refold_weight(np.full((1, 1, 1, 1), 6.0), np.array([2.0]), np.array([1.0])).ravel()
    array([3.], dtype=float32)

    Raises ValueError if ``old`` is zero for a row that is not given.
    """
    given = check_unfolding(old, None if rows is None else row_index)
    ratio = np.divide(new, old, out=np.zeros(old.shape), where=~given)
    result = fold_rows(folded, ratio.astype(np.float32))
    if rows is not None and row_index is not None:
        result[row_index] = fold_rows(rows, new[row_index])
    return result


def check_unfolding(old: Array, row_index: Array | None) -> npt.NDArray[np.bool_]:
    """Which output channels (c_out,) are given unfolded, as ``row_index`` says; all others can be unfolded.

    >>> check_unfolding(np.array([0.0, 2.0]), np.array([0]))
    array([ True, False])

    Raises ValueError if ``old`` is zero for a row that is not given.
    """
    given = np.zeros(old.shape, bool)
    if row_index is not None:
        given[row_index] = True
    lost = np.flatnonzero((old == 0) & ~given)
    if lost.size:
        raise ValueError(f"rows {lost.tolist()} were multiplied by zero and cannot be unfolded")
    return given
