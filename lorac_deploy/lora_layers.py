"""Layers whose weight is used as W + scale * arrange(B A) (LoRA-C, arXiv 2410.16954): convolutions and nn.Linear.

``weight`` and ``bias`` keep their names and their values; ``train()`` and ``eval()`` touch neither. The update
itself is `lorac_runtime.delta.delta`, so stride, dilation, groups, padding mode and kernel shape need no care.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lorac_deploy.timm_layers import base_of, plain_class, sister_class
from lorac_runtime.delta import Layout, adapter_shapes, delta

Plain = nn.Conv1d | nn.Conv2d | nn.Linear
Layer = TypeVar("Layer", nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class LayerAdapter:
    """Settings of one layer's adapter. ``r`` is the nominal rank in ``scale = alpha / r``, ``rank`` that of B A.

    ``pairs``: how many pairs of factors share the output channels; one for each channel is kernel-wise LoRA.
    """

    r: int
    rank: int
    alpha: float
    layout: Layout
    learnable_alpha: bool = False
    pairs: int = 1


class LoraLayer(nn.Module):
    """What `LoraConv1d`, `LoraConv2d` and `LoraLinear` share; made by `adapt` or from a layer, not by a constructor."""

    weight: Any
    bias: Any
    lora_a: nn.Parameter  # (pairs * rank, c_in/groups * k_w)
    lora_b: nn.Parameter  # (c_out * k_h, rank)
    lora_alpha: nn.Parameter | None  # (1,)
    adapter: LayerAdapter

    def __init__(self, *_: object) -> None:
        name = type(self).__name__
        maker = "from_linear(linear" if issubclass(type(self), nn.Linear) else "from_conv(conv"
        raise TypeError(f"{name} is made from a plain layer: {name}.{maker}, LayerAdapter(...))")

    @property
    def scale(self) -> float | Tensor:
        """alpha / r; a tensor (1,) where alpha is learned."""
        alpha = self.adapter.alpha if self.lora_alpha is None else self.lora_alpha
        return alpha / self.adapter.r

    def weight_delta(self) -> Tensor:
        """The update that forward() adds to ``weight``, in the weight's shape."""
        shape, a = tuple(self.weight.shape), self.adapter
        update: Tensor = delta(self.lora_a, self.lora_b, shape, self.scale, a.layout, pairs=a.pairs)
        return update

    def forward(self, input: Tensor) -> Tensor:
        """The layer with ``weight + weight_delta()``."""
        return self.with_weight(input, self.weight + self.weight_delta())

    def with_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """What the layer does to ``input`` with another weight of the same shape."""
        conv_forward: Any = self._conv_forward  # of nn.Conv1d or nn.Conv2d: handles padding modes
        return cast(Tensor, conv_forward(input, weight, self.bias))

    def extra_repr(self) -> str:
        """The layer's own settings, then the adapter's."""
        a, own = self.adapter, cast(Any, super()).extra_repr()
        pairs = f", pairs={a.pairs}" if a.pairs > 1 else ""
        return f"{own}, r={a.r}, rank={a.rank}, alpha={a.alpha:g}, layout={a.layout}{pairs}"


class LoraConv1d(LoraLayer, nn.Conv1d):
    """nn.Conv1d plus ``lora_a`` (rank, c_in/groups * k), ``lora_b`` (c_out, rank), perhaps ``lora_alpha`` (1,).

    >>> layer = LoraConv1d.from_conv(nn.Conv1d(8, 8, 3), LayerAdapter(r=2, rank=2, alpha=4.0, layout="spatial"))
    >>> layer(torch.zeros(1, 8, 5)).shape
    torch.Size([1, 8, 3])
    """

    @classmethod
    def from_conv(
        cls, conv: nn.Conv1d, adapter: LayerAdapter, *, generator: torch.Generator | None = None
    ) -> LoraConv1d:
        """A new layer that shares ``conv``'s parameters; its inverse is `to_conv`."""
        return cast(LoraConv1d, adapt(_twin(conv), adapter, generator=generator))

    def to_conv(self) -> nn.Conv1d:
        """A new plain convolution that holds ``weight + weight_delta()``."""
        return cast(nn.Conv1d, merge(copy.deepcopy(self)))


class LoraConv2d(LoraLayer, nn.Conv2d):
    """nn.Conv2d plus ``lora_a`` (rank, c_in/groups * k_w), ``lora_b`` (c_out * k_h, rank), perhaps ``lora_alpha``.

    >>> conv = nn.Conv2d(8, 8, 3)
    >>> layer = LoraConv2d.from_conv(conv, LayerAdapter(r=2, rank=6, alpha=4.0, layout="spatial"))
    >>> x = torch.ones(1, 8, 5, 5)
    >>> torch.equal(layer(x), conv(x)), sorted(layer.state_dict())
    (True, ['bias', 'lora_a', 'lora_b', 'weight'])
    """

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, adapter: LayerAdapter, *, generator: torch.Generator | None = None
    ) -> LoraConv2d:
        """A new layer that shares ``conv``'s parameters; its inverse is `to_conv`."""
        return cast(LoraConv2d, adapt(_twin(conv), adapter, generator=generator))

    def to_conv(self) -> nn.Conv2d:
        """A new plain convolution that holds ``weight + weight_delta()``."""
        return cast(nn.Conv2d, merge(copy.deepcopy(self)))


class LoraLinear(LoraLayer, nn.Linear):
    """nn.Linear plus ``lora_a`` (rank, c_in), ``lora_b`` (c_out, rank), perhaps ``lora_alpha`` (1,).

    >>> linear = nn.Linear(8, 4)
    >>> layer = LoraLinear.from_linear(linear, LayerAdapter(r=2, rank=2, alpha=4.0, layout="spatial"))
    >>> torch.equal(layer(torch.ones(1, 8)), linear(torch.ones(1, 8))), type(layer.to_linear()).__name__
    (True, 'Linear')
    """

    def with_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """``input`` (..., c_in) times another weight (c_out, c_in)."""
        return nn.functional.linear(input, weight, self.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, adapter: LayerAdapter, *, generator: torch.Generator | None = None
    ) -> LoraLinear:
        """A new layer that shares ``linear``'s parameters; its inverse is `to_linear`."""
        return cast(LoraLinear, adapt(_twin(linear), adapter, generator=generator))

    def to_linear(self) -> nn.Linear:
        """A new plain layer that holds ``weight + weight_delta()``."""
        return cast(nn.Linear, merge(copy.deepcopy(self)))


ADAPTED: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Conv1d: LoraConv1d,
    nn.Conv2d: LoraConv2d,
    nn.Linear: LoraLinear,
}


def adapted_class(kind: type[nn.Module]) -> type[LoraLayer] | None:
    """What a layer of class ``kind`` becomes with an adapter; None where it takes none.

    >>> adapted_class(nn.Conv2d).__name__, adapted_class(nn.ReLU)
    ('LoraConv2d', None)
    """
    made = ADAPTED.get(base_of(kind))
    return made if made is None or kind in ADAPTED else sister_class(made, kind)


def adapt(layer: Plain, adapter: LayerAdapter, *, generator: torch.Generator | None = None) -> LoraLayer:
    """Turn ``layer`` into its `LoraLayer` class **in place**; `release` undoes it.

    The object stays the same one, so every reference to it, its hooks and its parameters keep working.
    ``lora_a`` starts uniform within 1/sqrt(c_in/groups * k_w), Kaiming's bound for a = sqrt(5); ``lora_b`` starts
    at zero, so that nothing changes yet.

    >>> conv = nn.Conv2d(4, 4, 3)
    >>> adapt(conv, LayerAdapter(r=1, rank=3, alpha=2.0, layout="paper")) is conv
    True

    Raises TypeError for anything but a plain nn.Conv1d, nn.Conv2d or nn.Linear.
    """
    made = adapted_class(type(layer))
    if made is None:
        raise TypeError(f"only plain nn.Conv1d, nn.Conv2d and nn.Linear take an adapter, got {type(layer).__name__}")
    adapted: LoraLayer = recast(layer, made)
    shape_a, shape_b = adapter_shapes(tuple(layer.weight.shape), adapter.rank, adapter.pairs)
    bound = 1 / math.sqrt(shape_a[1])
    lora_a = torch.empty(shape_a).uniform_(-bound, bound, generator=generator)
    alpha = torch.full((1,), adapter.alpha) if adapter.learnable_alpha else None
    adapted.adapter = adapter
    adapted.lora_a = nn.Parameter(lora_a.to(layer.weight))
    adapted.lora_b = nn.Parameter(torch.zeros(shape_b).to(layer.weight))
    adapted.register_parameter("lora_alpha", None if alpha is None else nn.Parameter(alpha.to(layer.weight)))
    return adapted


def release(layer: LoraLayer) -> Plain:
    """Turn ``layer`` back into the plain one it was, in place; the adapter is gone, the weight untouched.

    >>> conv = nn.Conv2d(4, 4, 3)
    >>> layer = adapt(conv, LayerAdapter(r=1, rank=3, alpha=2.0, layout="paper"))
    >>> type(release(layer)), sorted(conv.state_dict())
    (<class 'torch.nn.modules.conv.Conv2d'>, ['bias', 'weight'])
    """
    del layer.lora_a, layer.lora_b, layer.lora_alpha, layer.adapter
    return cast(Plain, recast(layer, plain_class(type(layer))))


def merge(layer: LoraLayer) -> Plain:
    """`release`, but the weight becomes ``weight + weight_delta()``, in place. There is no way back.

    >>> layer = adapt(nn.Conv2d(4, 4, 3), LayerAdapter(r=1, rank=3, alpha=2.0, layout="paper"))
    >>> type(merge(layer)).__name__
    'Conv2d'
    """
    with torch.no_grad():
        layer.weight += layer.weight_delta()
    return release(layer)


def recast(module: nn.Module, kind: type[Any]) -> Any:
    """``module`` itself, its class replaced by a sister class that keeps its state in ``__dict__`` alike.

    >>> type(recast(nn.ReLU(), nn.Identity)).__name__
    'Identity'
    """
    object.__setattr__(module, "__class__", kind)
    return module


def _twin(module: Layer) -> Layer:
    """Another object of the same class that shares the parameters but not the dictionaries that hold them."""
    twin = type(module).__new__(type(module))
    copied = {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(module).items()}
    vars(twin).update(copied)
    return twin
