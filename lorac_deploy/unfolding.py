"""An adapter that adds to BN-folded weights, expressed for the weights before folding."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorac_deploy.folding import array
from lorac_deploy.partial_layers import PartialLayer
from lorac_deploy.structure import tensor_name
from lorac_runtime.delta import conv_dims
from lorac_runtime.folding import fold_factor

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

# Dividing by g keeps float32's relative precision whatever its size; below this, sums of the quotients overflow.
SMALLEST_FACTOR = 1e-12
_UNCHANGED = 1e-9  # a folded row that differs from the network's own by less was not trained


@dataclass(frozen=True)
class _Site:
    """A convolution and the BN behind it, or a BN that stands alone. ``factor`` is g, (c_out,) float64."""

    weight: Array
    bias: Array | None
    factor: npt.NDArray[np.float64]
    beta: Array
    mean: Array
    channels: tuple[int, ...] = ()  # that train


def as_shifts(pairs: Mapping[str, str], tensors: Tensors, trained: Container[str]) -> Tensors:
    """Folded biases and shifts under the names of the BN shifts that ``trained`` has instead, (channels,) each.

    Their values stay folded; `unfold` computes the shifts from them.

    >>> as_shifts({"bn": "conv"}, {"conv.bias": np.ones(2)}, {"bn.bias"})
    {'bn.bias': array([1., 1.])}
    """
    names = {tensor_name(conv, "bias"): tensor_name(bn, "bias") for bn, conv in pairs.items()}
    moved = {n: names[n] for n in tensors if n in names and n not in trained and names[n] in trained}
    kept = {n: v for n, v in tensors.items() if n not in moved and n not in moved.values()}
    alone = {n: v.reshape(-1) for n, v in kept.items() if v.ndim > 1 and n.endswith(".bias")}  # of a Mul + Add
    return kept | alone | {moved[n]: tensors[n] for n in moved}


def unfold(
    module: nn.Module, pairs: Mapping[str, str], tensors: Tensors, statistics: Tensors
) -> tuple[Tensors, list[str]]:
    """Folded ``tensors`` as unfolded ones, and the layers where that is impossible because g is near zero.

    ``pairs`` maps BN layers to convolutions. ``statistics``, by state-dict key, replace the network's own BN tensors.
    Rows with g near zero pass if they are still the network's own.
    """
    moved, problems = dict(tensors), []
    for bn, conv in pairs.items():
        site = _site(module, bn, conv, statistics)
        for leaf, convert in (("lora_b", _lora_b), ("partial", _partial), ("weight", _weight), ("bias", _bias)):
            name = tensor_name(conv, leaf)
            if name in tensors:
                moved[name], lost = convert(site, tensors[name].astype(np.float64))
                problems += [_no_way_back(name, bn, lost)] if lost.any() else []
    for bn, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (name := tensor_name(bn, "bias")) in tensors:
            moved[name] = _shift(_site(module, bn, pairs.get(bn), statistics), tensors[name].astype(np.float64))
    return moved, problems


def _site(module: nn.Module, bn_name: str, conv_name: str | None, statistics: Tensors) -> _Site:
    bn: Any = module.get_submodule(bn_name)
    conv: Any = None if conv_name is None else module.get_submodule(conv_name)
    own = {leaf: getattr(bn, leaf) for leaf in ("weight", "bias", "running_mean", "running_var")}
    plain = {"weight": np.ones(bn.num_features), "bias": np.zeros(bn.num_features)}
    now = {leaf: plain[leaf] if value is None else array(value) for leaf, value in own.items()}
    now |= {leaf: statistics[key] for leaf in own if (key := tensor_name(bn_name, leaf)) in statistics}
    return _Site(
        weight=np.empty(0) if conv is None else array(conv.weight),
        bias=None if conv is None or conv.bias is None else array(conv.bias),
        factor=fold_factor(now["weight"], now["running_var"], bn.eps),
        beta=now["bias"].astype(np.float64),
        mean=now["running_mean"].astype(np.float64),
        channels=conv.connections.channels if isinstance(conv, PartialLayer) else (),
    )


def _lora_b(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    k_h = conv_dims(site.weight.shape)[2]
    return _divide(folded, np.repeat(site.factor, k_h), np.zeros_like(folded))


def _partial(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    return _divide(folded, site.factor, site.weight[:, list(site.channels)])


def _weight(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    return _divide(folded, site.factor, site.weight)


def _bias(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    own = -site.mean if site.bias is None else site.bias - site.mean
    quotient, lost = _divide(folded - site.beta, site.factor, own)
    return (quotient + site.mean).astype(np.float32), lost


def _shift(site: _Site, folded: Array) -> Array:
    """beta of the folded bias (bias - mean) * g + beta; nothing is divided by g."""
    own = -site.mean if site.bias is None else site.bias - site.mean
    shift: Array = (folded - own * site.factor).astype(np.float32)
    return shift


def _divide(folded: Array, factor: npt.NDArray[np.float64], own: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """``folded`` / ``factor`` by rows, ``own`` rows where the factor is near zero; and which rows are lost there."""
    rows = factor.reshape(-1, *[1] * (folded.ndim - 1))
    tiny = np.abs(rows) < SMALLEST_FACTOR
    trained = np.abs(folded - own * rows) > _UNCHANGED
    quotient = np.where(tiny, own, folded / np.where(tiny, 1.0, rows))
    lost = np.asarray((tiny & trained).reshape(factor.size, -1).any(axis=1))
    return quotient.astype(np.float32), lost


def _no_way_back(name: str, bn: str, lost: npt.NDArray[np.bool_]) -> str:
    return (
        f"{name}: {int(lost.sum())} rows were trained where gamma / sigma of {bn} is near zero, so they cannot be "
        "expressed before folding; use the fused file, or load the adapter into fold_batchnorm(network), which keeps "
        "folded coordinates"
    )
