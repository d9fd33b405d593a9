"""Batch-normalisation statistics as PyTorch keeps them, and what a change of them does to folded weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.delta import conv_dims
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import BatchNorm, Manifest

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


def samples(bn: BatchNorm, batch: int) -> int:
    """Values per channel that ``bn`` sees in a batch: batch * height * width.

    Raises DataError for a single one, which has no variance.
    """
    count = batch * bn.positions
    if count < 2:
        raise DataError(
            f"{bn.name} sees one value per channel in a batch of {batch} image: it has no variance; "
            "use batches of at least 2 images"
        )
    return count


def unbiased_running_var(old: Floats, moved: Floats, *, momentum: float, count: int) -> Floats:
    """PyTorch's running variance from one that was moved by the biased variance of a batch.

    ``moved`` = (1 - m) old + m var; PyTorch moves by var * n / (n - 1), n = ``count`` values per channel.

    >>> one, two = np.ones(1, np.float32), np.full(1, 2.0, np.float32)       # the batch's variance is 3
    >>> unbiased_running_var(one, two, momentum=0.5, count=3)                # 0.5 * 1 + 0.5 * 3 * 3/2
    array([2.75], dtype=float32)
    """
    kept = (1.0 - momentum) * old.astype(np.float64)
    return (kept + (moved - kept) * (count / (count - 1))).astype(np.float32)


def cumulative_average(
    batchnorms: tuple[BatchNorm, ...], batches: Iterable[tuple[int, Mapping[str, Array]]]
) -> dict[str, Floats]:
    """Running statistics by name after some batches, as PyTorch's BN with ``momentum=None`` averages them.

    A batch is (number of images, {"<bn>.batch_mean": (C,), "<bn>.batch_var": (C,), biased}). Every batch counts
    the same, whatever its size.

    Raises DataError if there is no batch, or a batch without variance.
    """
    sums: dict[str, Any] = {}
    total = 0
    for size, found in batches:
        total += 1
        for bn in batchnorms:
            count = samples(bn, size)
            unbiased = found[f"{bn.name}.batch_var"].astype(np.float64) * (count / (count - 1))
            sums[bn.running_mean] = sums.get(bn.running_mean, 0.0) + found[f"{bn.name}.batch_mean"]
            sums[bn.running_var] = sums.get(bn.running_var, 0.0) + unbiased
    if total == 0:
        raise DataError("no image to estimate BN statistics from")
    return {name: (value / total).astype(np.float32) for name, value in sums.items()}


def moved_trained(
    manifest: Manifest,
    bn: BatchNorm,
    tensors: Mapping[str, Floats],
    *,
    old: Mapping[str, Array],
    new: Mapping[str, Array],
) -> dict[str, Floats]:
    """What trained tensors that ``bn`` is folded into become when its statistics change: the same network unfolded.

    ``old`` and ``new`` hold weight, bias and running statistics of ``bn`` by name, the first two alike in both.
    With g = gamma / sqrt(var + eps), weights and lora_b scale by g_new / g_old = sqrt(var_old + eps) /
    sqrt(var_new + eps), so nothing is divided by gamma; a bias b, or the shift of a BN that stands alone, becomes
    beta + (b - beta) g_new / g_old + (mean_old - mean_new) g_new.
    """
    sigma_old, sigma_new = (np.sqrt(v[bn.running_var].astype(np.float64) + bn.eps) for v in (old, new))
    ratio = sigma_old / sigma_new
    rows = {name: k for name, k in _scaled_rows(manifest, bn).items() if name in tensors}
    changed = {name: _scaled(tensors[name], np.repeat(ratio, k), bn.affine) for name, k in rows.items()}
    if (bias := tensors.get(bn.folded_into[1])) is not None:
        beta = new[bn.bias].astype(np.float64)
        moved = (old[bn.running_mean].astype(np.float64) - new[bn.running_mean]) * new[bn.weight] / sigma_new
        values = beta + (bias.reshape(-1).astype(np.float64) - beta) * ratio + moved
        changed[bn.folded_into[1]] = values.reshape(bias.shape).astype(np.float32)
    return changed


def _scaled_rows(manifest: Manifest, bn: BatchNorm) -> dict[str, int]:
    """The tensors that scale with the weight ``bn`` is folded into: name -> rows per output channel."""
    weight = bn.folded_into[0]
    adapters = (a for a in manifest.adapters if a.weight == weight)
    partials = {p.tensor: 1 for p in manifest.partials if p.weight == weight}
    return {weight: 1} | partials | {a.lora_b: conv_dims(a.weight_shape)[2] for a in adapters}


def _scaled(tensor: Floats, factor: Array, affine: bool) -> Floats:
    """Scale along the channels: axis 1 of an affine (1, C, 1, 1), else axis 0."""
    shape = [1] * tensor.ndim
    shape[1 if affine else 0] = -1
    result: Floats = (tensor * factor.reshape(shape)).astype(np.float32)
    return result
