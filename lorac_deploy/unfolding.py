"""An adapter that adds to BN-folded weights, expressed for the weights before folding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lorac_deploy.folding import array
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
    """A convolution and the BN behind it. ``factor`` is g, (c_out,) float64."""

    conv: str
    weight: Array
    bias: Array | None
    factor: npt.NDArray[np.float64]
    beta: Array
    mean: Array


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
        for leaf, convert in (("lora_b", _lora_b), ("weight", _weight), ("bias", _bias)):
            name = tensor_name(conv, leaf)
            if name in tensors:
                moved[name], lost = convert(site, tensors[name].astype(np.float64))
                problems += [_no_way_back(name, bn, lost)] if lost.any() else []
    return moved, problems


def _site(module: nn.Module, bn_name: str, conv_name: str, statistics: Tensors) -> _Site:
    bn: Any = module.get_submodule(bn_name)
    conv: Any = module.get_submodule(conv_name)
    own = {leaf: getattr(bn, leaf) for leaf in ("weight", "bias", "running_mean", "running_var")}
    plain = {"weight": np.ones(bn.num_features), "bias": np.zeros(bn.num_features)}
    now = {leaf: plain[leaf] if value is None else array(value) for leaf, value in own.items()}
    now |= {leaf: statistics[key] for leaf in own if (key := tensor_name(bn_name, leaf)) in statistics}
    return _Site(
        conv=conv_name,
        weight=array(conv.weight),
        bias=None if conv.bias is None else array(conv.bias),
        factor=fold_factor(now["weight"], now["running_var"], bn.eps),
        beta=now["bias"].astype(np.float64),
        mean=now["running_mean"].astype(np.float64),
    )


def _lora_b(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    k_h = conv_dims(site.weight.shape)[2]
    return _divide(folded, np.repeat(site.factor, k_h), np.zeros_like(folded))


def _weight(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    return _divide(folded, site.factor, site.weight)


def _bias(site: _Site, folded: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    own = -site.mean if site.bias is None else site.bias - site.mean
    quotient, lost = _divide(folded - site.beta, site.factor, own)
    return (quotient + site.mean).astype(np.float32), lost


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
