"""batchnorm.safetensors: what a device needs to undo and redo the folding of BN (see docs/artifact.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorac_runtime.folding import fold_factor
from lorac_runtime.manifest import BatchNorm

Array = npt.NDArray[np.generic]
SMALLEST_FACTOR = 1e-4  # below this, dividing folded rows by the factor would lose more than a float32 keeps


def batchnorm_tensors(
    batchnorms: tuple[BatchNorm, ...], unfolded: dict[str, npt.NDArray[np.float32]]
) -> dict[str, Array]:
    """The tensors of every BN by their own names, and what folding loses: conv biases, rows with tiny factors.

    ``unfolded`` holds the parameters before folding. For a BN folded into a convolution: ``<bn>.conv_bias``
    (c_out,), and where |gamma / sigma| is below 1e-4 of the layer's largest (or of 1), ``<bn>.conv_rows``
    (n, c_in, k, k) with ``<bn>.conv_row_index`` (n,) int64.
    """
    tensors: dict[str, Array] = {}
    for bn in batchnorms:
        for name in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensors[name] = unfolded[name]
        if not bn.affine:
            tensors |= _lost_by_folding(bn, unfolded)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}  # safetensors writes memory as it is


def _lost_by_folding(bn: BatchNorm, unfolded: dict[str, npt.NDArray[np.float32]]) -> dict[str, Array]:
    weight_name, bias_name = bn.folded_into
    weight = unfolded[weight_name]
    bias = unfolded.get(bias_name, np.zeros(weight.shape[0], np.float32))
    found: dict[str, Array] = {f"{bn.name}.conv_bias": bias}
    factor = np.abs(fold_factor(unfolded[bn.weight], unfolded[bn.running_var], bn.eps))
    rows = np.flatnonzero(factor <= SMALLEST_FACTOR * max(float(factor.max()), 1.0))
    if rows.size:
        found[f"{bn.name}.conv_rows"] = weight[rows]
        found[f"{bn.name}.conv_row_index"] = rows.astype(np.int64)
    return found
