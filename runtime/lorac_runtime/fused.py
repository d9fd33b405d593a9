"""The final numbers of every weight that training changed: W + delta, batch normalisation folded back in.

Under the policy ``frozen`` the trained tensors already belong to the folded network. Under ``batch`` training
ran beside live batch normalisation, so weights and adapters are folded with its new statistics afterwards.
Under ``recalibrate`` the base is folded with re-estimated statistics first, and adapters add to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.delta import conv_dims, delta
from lorac_runtime.errors import ArtifactError
from lorac_runtime.expected import missing_batchnorm
from lorac_runtime.folding import Doubles, fold_bias, fold_factor, fold_rows, refold_weight, scale_rows
from lorac_runtime.manifest import Adapter, BatchNorm, Manifest

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

# Multiply-adds of one matrix product. Above 2**18 OpenBLAS wakes its threads, and beside a busy core it then
# waits for them: a layer of 512 channels took up to 400 ms instead of 4.
_BLOCK = 1 << 18


def fused_weights(manifest: Manifest, base: Tensors, state: Tensors, batchnorm: Tensors) -> dict[str, Array]:
    """Final value, float32, of every tensor of the patch table that changes.

    ``base`` holds the patch table's tensors as the base file has them, ``state`` every trainable tensor and,
    unless the policy is ``frozen``, the running statistics; ``batchnorm`` is batchnorm.safetensors.

    Raises ArtifactError if a tensor is missing that the artifact should hold, KeyError if ``state`` is not
    complete (`expected.state_problems` lists what is missing).
    """
    sites = _sites(manifest, state, batchnorm)
    values: dict[str, Array] = {}
    for site in sites.values():
        values.update(site.refolded(base, batchnorm))
    values.update(_trained_in_full(manifest, base, state, sites))
    for adapter in manifest.adapters:
        start = values.get(adapter.weight, base.get(adapter.weight))
        if start is None:
            raise ArtifactError(f"the patch table has no entry for {adapter.weight}; export the artifact again")
        live = sites.get(adapter.weight) if manifest.bn_policy == "batch" else None
        values[adapter.weight] = _plus_delta(start, adapter, state, live)
    return values


class _Site:
    """A batch normalisation whose statistics changed; ``old`` and ``new`` are gamma / sigma before and after."""

    def __init__(self, bn: BatchNorm, before: Tensors, after: Tensors) -> None:
        self.bn = bn
        self.old: Doubles = fold_factor(before[bn.weight], before[bn.running_var], bn.eps)
        self.new: Doubles = fold_factor(after[bn.weight], after[bn.running_var], bn.eps)
        self.beta, self.mean = after[bn.bias], after[bn.running_mean]

    def refolded(self, base: Tensors, batchnorm: Tensors) -> dict[str, Array]:
        """The two tensors of the base file that this batch normalisation reaches, without any adapter."""
        first, second = self.bn.folded_into
        if self.bn.affine:
            scale = self.new.astype(np.float32).reshape(base[first].shape)
            return {first: scale, second: self.folded_bias(None).reshape(base[second].shape)}
        rows, index = (batchnorm.get(f"{self.bn.name}.{part}") for part in ("conv_rows", "conv_row_index"))
        try:
            weight = refold_weight(base[first], self.old, self.new, rows, index)
        except ValueError as err:
            raise ArtifactError(f"{self.bn.name}: {err}; export the artifact again") from err
        return {first: weight, second: self.folded_bias(batchnorm[f"{self.bn.name}.conv_bias"])}

    def folded_bias(self, bias: Array | None) -> Array:
        """(bias - mean) * g + beta."""
        return fold_bias(bias, self.new, self.beta, self.mean)


def _sites(manifest: Manifest, state: Tensors, batchnorm: Tensors) -> dict[str, _Site]:
    """Batch normalisations that moved, by the first tensor they were folded into; none when frozen."""
    if manifest.bn_policy == "frozen":
        return {}
    wanted = "unfolded" if manifest.bn_policy == "batch" else "folded"
    if manifest.batchnorms and manifest.coordinates != wanted:
        raise ArtifactError(f"bn_policy {manifest.bn_policy!r} needs {wanted} coordinates; export the artifact again")
    missing = missing_batchnorm(manifest, batchnorm)
    if missing:
        raise ArtifactError(f"batchnorm.safetensors has no {', '.join(missing)}; export the artifact again")
    after = dict(batchnorm) | _batchnorm_part(manifest, state)
    return {bn.folded_into[0]: _Site(bn, batchnorm, after) for bn in manifest.batchnorms}


def _batchnorm_part(manifest: Manifest, state: Tensors) -> dict[str, Array]:
    """The state's batch normalisation tensors. A trained one in folded coordinates is a weight of its own."""
    trained = {t.name for t in manifest.trainables} if manifest.coordinates == "folded" else set()
    names = [n for bn in manifest.batchnorms for n in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    return {name: state[name] for name in names if name in state and name not in trained}


def _trained_in_full(manifest: Manifest, base: Tensors, state: Tensors, sites: Mapping[str, _Site]) -> dict[str, Array]:
    """Weights and biases without adapter, for the folded network."""
    live = sites if manifest.bn_policy == "batch" else {}
    by_bias = {site.bn.folded_into[1]: site for site in live.values()}
    values: dict[str, Array] = {}
    for item in manifest.trainables:
        if item.role not in ("weight", "bias") and (live or item.name not in base):
            continue  # factors of adapters, and batch normalisations, which the sites hold
        if item.name not in base:
            raise ArtifactError(f"the patch table has no entry for {item.name}; export the artifact again")
        value = state[item.name]
        if item.name in live:
            value = fold_rows(value, live[item.name].new)
        elif item.name in by_bias:
            value = by_bias[item.name].folded_bias(value)
        values[item.name] = value
    return values


def _plus_delta(start: Array, adapter: Adapter, state: Tensors, live: _Site | None) -> Array:
    """The folded weight ``start`` plus what the adapter adds to it."""
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    a, b = state[adapter.lora_a], state[adapter.lora_b]
    if live is not None:
        b = scale_rows(b, live.new, k_h)
    alpha = adapter.alpha if adapter.lora_alpha is None else float(state[adapter.lora_alpha][0])
    result = np.empty(adapter.weight_shape, np.float32)
    step = max(1, _BLOCK // (k_h * c_in * k_w * adapter.rank))
    for o in range(0, c_out, step):
        block = result[o : o + step]  # in both layouts, k_h rows of lora_b make one output channel
        rows = b[o * k_h : (o + step) * k_h]
        change = delta(a, rows, block.shape, alpha / adapter.r, adapter.arrangement)
        np.add(start[o : o + step], change, out=block)
    return result
