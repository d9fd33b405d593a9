"""What an adapter or a training state must hold for an artifact, and every way in which it does not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.delta import adapter_shapes
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import BASE, Adapter, BatchNorm, Manifest, Partial, Trainable

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, npt.NDArray[Any]]


def state_problems(manifest: Manifest, tensors: Tensors) -> list[str]:
    """Every mismatch of a training state (in the artifact's coordinates) with the artifact, one line each.

    Raises ArtifactError if the artifact itself lacks a patch entry for a batch normalisation.
    """
    return _tensor_problems(manifest, tensors, *_expected(manifest))


def adapter_problems(manifest: Manifest, tensors: Tensors, metadata: Mapping[str, str]) -> list[str]:
    """Every mismatch of an adapter, in the coordinates its metadata names, with the artifact, one line each.

    Raises ArtifactError as `state_problems` does.
    """
    required, optional = _expected(manifest)
    if metadata.get("coordinates") == "unfolded" and not manifest.live_batchnorm:
        _unfold_expected(manifest, required, optional)
    return _metadata_problems(manifest, metadata) + _tensor_problems(manifest, tensors, required, optional)


def fixed_tensors(adapters: Iterable[Adapter], trainables: Iterable[Trainable]) -> Shapes:
    """Tensors of adapters that no training step changes (a frozen ``lora_a``), with their shapes.

    They belong to an adapter all the same: without them there is no delta.
    """
    trained = {t.name for t in trainables}
    return {n: s for adapter in adapters for n, s in _adapter_shapes(adapter).items() if n not in trained}


def channels_digest(partials: Iterable[Partial]) -> str:
    """Which channels train in which layers, as 16 hex digits; an adapter file's metadata hold it as ``channels``.

    >>> one = Partial("conv", "conv.weight", "conv.partial", (4, 8, 3, 3), 1, (0, 5))
    >>> channels_digest([one])
    'bed4e242a325c22a'
    """
    text = ";".join(f"{p.layer}:{','.join(map(str, p.channels))}" for p in partials)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def missing_batchnorm(manifest: Manifest, tensors: Tensors) -> list[str]:
    """Names that batchnorm.safetensors should hold for this artifact and ``tensors`` lack.

    >>> from types import SimpleNamespace as Some
    >>> norm = Some(name="bn", weight="w", bias="b", running_mean="m", running_var="v", affine=False)
    >>> missing_batchnorm(Some(batchnorms=[norm]), {"w": 0, "b": 0, "m": 0})
    ['v', 'bn.conv_bias']
    """
    wanted: list[str] = []
    for bn in manifest.batchnorms:
        wanted += [bn.weight, bn.bias, bn.running_mean, bn.running_var]
        wanted += [] if bn.affine else [f"{bn.name}.conv_bias"]
    return [name for name in wanted if name not in tensors]


def _expected(manifest: Manifest) -> tuple[Shapes, Shapes]:
    """Names and shapes of what must be there, and of what may be."""
    required: Shapes = {t.name: t.shape for t in manifest.trainables}
    optional: Shapes = {}
    for adapter in manifest.adapters:
        required |= _adapter_shapes(adapter)
    if manifest.carries_statistics:
        for bn, channels in _channels(manifest):
            required[bn.running_mean] = required[bn.running_var] = (channels,)
            optional[bn.weight] = optional[bn.bias] = (channels,)
    return required, {name: shape for name, shape in optional.items() if name not in required}


def _adapter_shapes(adapter: Adapter) -> Shapes:
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank, adapter.pairs)
    alpha: Shapes = {} if adapter.lora_alpha is None else {adapter.lora_alpha: (1,)}
    return {adapter.lora_a: shape_a, adapter.lora_b: shape_b, **alpha}


def _channels(manifest: Manifest) -> list[tuple[BatchNorm, int]]:
    shapes = {p.tensor: p.shape for p in manifest.patches if p.file == BASE}
    missing = [bn.name for bn in manifest.batchnorms if not shapes.keys() >= set(bn.folded_into)]
    if missing:
        raise ArtifactError(
            f"bn_policy {manifest.bn_policy!r} changes {', '.join(missing)}, but the patch table has no entry "
            "for what they were folded into; export the artifact again"
        )
    return [(bn, math.prod(shapes[bn.folded_into[1]])) for bn in manifest.batchnorms]


def _unfold_expected(manifest: Manifest, required: Shapes, optional: Shapes) -> None:
    """Change the expectations of a folded artifact to those of an adapter that counts from unfolded weights."""
    for bn in manifest.batchnorms:
        scale, shift = bn.folded_into
        if bn.affine:
            for name, original in ((scale, bn.weight), (shift, bn.bias)):
                if name in required:
                    required[original] = (math.prod(required.pop(name)),)
        elif shift in required:
            # Most convolutions before a batch normalisation have no bias: there its own shift trains instead.
            optional[bn.bias] = optional[shift] = required.pop(shift)


def _tensor_problems(manifest: Manifest, tensors: Tensors, required: Shapes, optional: Shapes) -> list[str]:
    known = {**optional, **required}
    problems = [f"{name} is missing" for name in required if name not in tensors]
    unexpected = [name for name in tensors if name not in known]
    statistics = [n for n in unexpected if n in _batchnorm_names(manifest)]
    if statistics:
        problems.append(
            f"{len(statistics)} tensors of batch normalisation ({statistics[0]}, ...) do not belong here: the "
            f"artifact was exported with bn_policy {manifest.bn_policy!r}"
        )
    problems += [f"{name} is unexpected" for name in unexpected if name not in statistics]
    for name, shape in known.items():
        if name in tensors:
            problems += _array_problems(name, tensors[name], shape)
    for bn in manifest.batchnorms:
        if np.any(tensors.get(bn.running_var, np.zeros(1)) < 0):
            problems.append(f"{bn.running_var} has negative values")
    return problems


def _batchnorm_names(manifest: Manifest) -> set[str]:
    return {n for bn in manifest.batchnorms for n in (bn.weight, bn.bias, bn.running_mean, bn.running_var)}


def _array_problems(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> list[str]:
    if array.shape != tuple(shape):
        return [f"{name} has shape {array.shape}, expected {tuple(shape)}"]
    if array.dtype != np.float32:
        return [f"{name} is {array.dtype}, expected float32"]
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return [f"{name} has {bad} values of {array.size} that are not finite"] if bad else []


def _metadata_problems(manifest: Manifest, metadata: Mapping[str, str]) -> list[str]:
    expected = {"model": manifest.model, "method": manifest.method, "bn_policy": manifest.bn_policy}
    if metadata.get("base_sha256"):
        expected["base_sha256"] = manifest.files[BASE].sha256
    if manifest.adapters:
        expected.update(_common(manifest))
    if manifest.additions is not None:
        expected.update(manifest.additions.settings)
    if manifest.partials:
        expected["channels"] = channels_digest(manifest.partials)
    problems = []
    for key, wanted in expected.items():
        given = metadata.get(key)
        if given != wanted and not (key in ("r", "alpha") and _same_number(given, wanted)):
            problems.append(f"{key}: the adapter has {given!r}, the artifact {wanted!r}")
    return problems + _coordinate_problems(manifest, metadata.get("coordinates"))


def _common(manifest: Manifest) -> dict[str, str]:
    """Settings that all adapters of the artifact share; a learned alpha is a tensor, not a setting."""
    found = {
        "layout": {a.layout for a in manifest.adapters},
        "r": {str(a.r) for a in manifest.adapters},
        "alpha": {str(a.alpha) for a in manifest.adapters if a.lora_alpha is None},
    }
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _same_number(given: str | None, wanted: str) -> bool:
    try:
        return given is not None and float(given) == float(wanted)
    except ValueError:
        return False


def _coordinate_problems(manifest: Manifest, given: str | None) -> list[str]:
    if given == manifest.coordinates:
        return []
    if given == "folded":
        return [
            "coordinates: the adapter adds to folded weights, the artifact trains unfolded ones, and folding cannot "
            "always be undone; save the adapter from PyTorch in unfolded coordinates"
        ]
    if given != "unfolded":
        return [f"coordinates: expected 'folded' or 'unfolded', got {given!r}"]
    if not manifest.batchnorms:
        return [
            "coordinates: the adapter adds to unfolded weights, but the base holds no batch normalisation, or had "
            "its own folded before it was exported; export the artifact from the checkpoint the adapter belongs to"
        ]
    return []
