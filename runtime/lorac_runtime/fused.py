"""The final numbers of every weight that training changed: W + delta, batch normalisation folded back in.

In folded coordinates the trained tensors already belong to the folded network. In unfolded ones (the policy ``batch``,
or scale and shift that train) training ran beside live batch normalisation, so weights and adapters are folded with
it afterwards. Under ``recalibrate`` the base is folded with re-estimated statistics first, and adapters add to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.channels import Channels, Scratch
from lorac_runtime.delta import conv_dims, delta
from lorac_runtime.errors import ArtifactError
from lorac_runtime.expected import missing_batchnorm
from lorac_runtime.folding import (
    Doubles,
    check_unfolding,
    fold_bias,
    fold_factor,
    fold_rows,
    refold_weight,
    scale_rows,
)
from lorac_runtime.manifest import Adapter, BatchNorm, Manifest, Partial

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

# Multiply-adds of one matrix product. Above 2**18 OpenBLAS wakes its threads, and beside a busy core it then
# waits for them: a layer of 512 channels took up to 400 ms instead of 4.
_BLOCK = 1 << 18


def fused_weights(manifest: Manifest, base: Tensors, state: Tensors, batchnorm: Tensors) -> dict[str, Array]:
    """Final value, float32, of every tensor of the patch table that changes; see `fused_channels`."""
    return {name: value.whole() for name, value in fused_channels(manifest, base, state, batchnorm).items()}


def fused_channels(manifest: Manifest, base: Tensors, state: Tensors, batchnorm: Tensors) -> dict[str, Channels]:
    """Final value of every tensor of the patch table that changes, to be had in blocks of output channels.

    ``base`` holds the patch table's tensors as the base file has them, ``state`` every trainable tensor and,
    unless the policy is ``frozen``, the running statistics; ``batchnorm`` is batchnorm.safetensors.

    Raises ArtifactError if a tensor is missing that the artifact should hold, KeyError if ``state`` is not
    complete (`expected.state_problems` lists what is missing).
    """
    sites = _sites(manifest, state, batchnorm)
    values: dict[str, Channels] = {}
    for site in sites.values():
        values.update(site.refolded(base, batchnorm))
    values.update(_trained_in_full(manifest, base, state, sites))
    live = sites if manifest.live_batchnorm else {}
    for adapter in manifest.adapters:
        start = values.get(adapter.weight) or _stored(base, adapter.weight)
        values[adapter.weight] = _plus_delta(start, adapter, state, live.get(adapter.weight))
    for partial in manifest.partials:
        start = values.get(partial.weight) or _stored(base, partial.weight)
        values[partial.weight] = _with_columns(start, partial, state, live.get(partial.weight))
    return values


def _stored(base: Tensors, name: str) -> Channels:
    """A weight as the base file has it."""
    if name not in base:
        raise ArtifactError(f"the patch table has no entry for {name}; export the artifact again")
    return Channels.of(base[name])


class _Site:
    """A batch normalisation that changed; ``old`` and ``new`` are gamma / sigma before and after."""

    def __init__(self, bn: BatchNorm, before: Tensors, after: Tensors) -> None:
        self.bn = bn
        self.old: Doubles = fold_factor(before[bn.weight], before[bn.running_var], bn.eps)
        self.new: Doubles = fold_factor(after[bn.weight], after[bn.running_var], bn.eps)
        self.beta, self.mean = after[bn.bias], after[bn.running_mean]

    def refolded(self, base: Tensors, batchnorm: Tensors) -> dict[str, Channels]:
        """The two tensors of the base file that this batch normalisation reaches, without any adapter."""
        first, second = self.bn.folded_into
        if self.bn.affine:
            scale = self.new.astype(np.float32).reshape(base[first].shape)
            shift = self.folded_bias(None).reshape(base[second].shape)
            return {first: Channels.of(scale), second: Channels.of(shift)}
        bias = self.folded_bias(batchnorm[f"{self.bn.name}.conv_bias"])
        return {first: self._refolded_weight(base[first], batchnorm), second: Channels.of(bias)}

    def _refolded_weight(self, folded: Array, batchnorm: Tensors) -> Channels:
        given, index = (batchnorm.get(f"{self.bn.name}.{part}") for part in ("conv_rows", "conv_row_index"))
        try:
            check_unfolding(self.old, None if given is None else index)
        except ValueError as err:
            raise ArtifactError(f"{self.bn.name}: {err}; export the artifact again") from err

        def rows(o: int, p: int, scratch: Scratch) -> Array:
            del scratch
            part = slice(o, p)
            if given is None or index is None:
                return refold_weight(folded[part], self.old[part], self.new[part])
            inside = (index >= o) & (index < p)
            return refold_weight(folded[part], self.old[part], self.new[part], given[inside], index[inside] - o)

        return Channels(folded.shape, rows)

    def folded_bias(self, bias: Array | None) -> Array:
        """(bias - mean) * g + beta."""
        return fold_bias(bias, self.new, self.beta, self.mean)


def _sites(manifest: Manifest, state: Tensors, batchnorm: Tensors) -> dict[str, _Site]:
    """Batch normalisations that may have changed, by the first tensor they were folded into."""
    changed = manifest.refolded
    if not changed:
        return {}
    wanted = {"batch": "unfolded", "recalibrate": "folded"}.get(manifest.bn_policy, manifest.coordinates)
    if manifest.coordinates != wanted:
        raise ArtifactError(f"bn_policy {manifest.bn_policy!r} needs {wanted} coordinates; export the artifact again")
    missing = missing_batchnorm(manifest, batchnorm)
    if missing:
        raise ArtifactError(f"batchnorm.safetensors has no {', '.join(missing)}; export the artifact again")
    after = dict(batchnorm) | _batchnorm_part(manifest, state)
    return {bn.folded_into[0]: _Site(bn, batchnorm, after) for bn in changed}


def _batchnorm_part(manifest: Manifest, state: Tensors) -> dict[str, Array]:
    """The state's batch normalisation tensors. A trained one in folded coordinates is a weight of its own."""
    trained = {t.name for t in manifest.trainables} if manifest.coordinates == "folded" else set()
    names = [n for bn in manifest.batchnorms for n in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    return {name: state[name] for name in names if name in state and name not in trained}


def _trained_in_full(
    manifest: Manifest, base: Tensors, state: Tensors, sites: Mapping[str, _Site]
) -> dict[str, Channels]:
    """Weights and biases without adapter, for the folded network."""
    live = sites if manifest.live_batchnorm else {}
    by_bias = {site.bn.folded_into[1]: site for site in live.values()}
    values: dict[str, Channels] = {}
    for item in manifest.trainables:
        if item.role not in ("weight", "bias") and (live or item.name not in base):
            continue  # factors of adapters, and batch normalisations, which the sites hold
        if item.name not in base:
            raise ArtifactError(f"the patch table has no entry for {item.name}; export the artifact again")
        value = state[item.name]
        if item.name in live:
            values[item.name] = _folded_rows(value, live[item.name].new)
        elif item.name in by_bias:
            values[item.name] = Channels.of(by_bias[item.name].folded_bias(value))
        else:
            values[item.name] = Channels.of(value)
    return values


def _folded_rows(weight: Array, factor: Doubles) -> Channels:
    return Channels(weight.shape, lambda o, p, _: fold_rows(weight[o:p], factor[o:p]))


def _plus_delta(start: Channels, adapter: Adapter, state: Tensors, live: _Site | None) -> Channels:
    """The folded weight ``start`` plus what the adapter adds to it."""
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    a, b = state[adapter.lora_a], state[adapter.lora_b]
    if live is not None:
        b = scale_rows(b, live.new, k_h)
    alpha = adapter.alpha if adapter.lora_alpha is None else float(state[adapter.lora_alpha][0])
    share = c_out // adapter.pairs if adapter.pairs > 1 else 1  # channels that must stay together
    step = max(1, _BLOCK // (k_h * c_in * k_w * adapter.rank) // share) * share
    if start.step > 1:  # another adapter's sum, whose blocks are not these
        start = Channels.of(start.whole())

    def change(first: int, last: int) -> Array:
        rows = b[first * k_h : last * k_h]  # in both layouts, k_h rows of lora_b make one output channel
        shape, pairs = (last - first, *adapter.weight_shape[1:]), (last - first) // share if adapter.pairs > 1 else 1
        own = a if adapter.pairs == 1 else a[first // share * adapter.rank : last // share * adapter.rank]
        return delta(own, rows, shape, alpha / adapter.r, adapter.arrangement, pairs=pairs)

    def sums(o: int, p: int, scratch: Scratch) -> Array:
        result = scratch.array("sum", (p - o, *adapter.weight_shape[1:]))
        np.copyto(result, start.rows(o, p, scratch))
        changes = (change(first, min(first + step, p)) for first in range(o, p, step))
        if adapter.arrangement == "spatial" and k_h > 1:
            _add_spatial(result.reshape((-1, c_in, k_h, k_w)), changes, scratch)
        else:
            _add(result, changes)
        return result

    return Channels(adapter.weight_shape, sums, step)


def _with_columns(start: Channels, partial: Partial, state: Tensors, live: _Site | None) -> Channels:
    """The folded weight ``start`` with the trained input channels in their places."""
    trained = state[partial.tensor] if live is None else fold_rows(state[partial.tensor], live.new)
    places = list(partial.channels)

    def replaced(o: int, p: int, scratch: Scratch) -> Array:
        result = scratch.array("replaced", (p - o, *partial.weight_shape[1:]))
        np.copyto(result, start.rows(o, p, scratch))
        result[:, places] = trained[o:p]
        return result

    return Channels(partial.weight_shape, replaced, start.step)


def _add(result: Array, changes: Iterable[Array]) -> None:
    """Add ``changes``, which follow one another along the first axis."""
    at = 0
    for change in changes:
        result[at : at + len(change)] += change
        at += len(change)


def _add_spatial(result: Array, changes: Iterable[Array], scratch: Scratch) -> None:
    """`_add` for changes that lie in memory as (c_out, k_h, c_in, k_w), in half the time.

    Numpy would loop over the few columns of a kernel inside; here it loops over input channels.
    """
    n, c_in, k_h, k_w = result.shape
    held, at = scratch.array("changes", (n, k_h, c_in, k_w)), 0
    for change in changes:
        held[at : at + len(change)] = change.swapaxes(1, 2)
        at += len(change)
    for u, v in np.ndindex(k_h, k_w):
        place = result[:, :, u, v]
        place += held[:, u, :, v]
