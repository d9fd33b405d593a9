"""Layers some of whose input channels train directly, as a parameter of their own (PaCA, 2025).

``weight`` and ``bias`` keep their names and values; the layer computes with ``weight`` in which ``partial`` takes the
place of ``weight[:, channels]``. ``train()`` and ``eval()`` touch neither.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorac_deploy.lora_layers import recast
from lorac_deploy.timm_layers import base_of, plain_class, sister_class
from lorac_runtime.manifest import Partial


class PartialLayer(nn.Module):
    """What the partial layers share; made by `take_channels`, never by a constructor."""

    partial: nn.Parameter  # (c_out, number of channels, k...)
    connections: Partial

    def __init__(self, *_: object) -> None:
        raise TypeError(f"{type(self).__name__} is made from a layer: take_channels(layer, Partial(...))")

    def whole_weight(self) -> Tensor:
        """The weight that forward() computes with: ``partial`` in its places, ``weight`` elsewhere."""
        weight = cast(Tensor, self.weight)
        index = torch.tensor(self.connections.channels, device=weight.device)
        return weight.index_copy(1, index, self.partial)

    def extra_repr(self) -> str:
        """The layer's own settings, then how many channels train."""
        own = cast(Any, super()).extra_repr()
        return f"{own}, {len(self.connections.channels)} of {self.connections.weight_shape[1]} input channels train"


class _PartialConv(PartialLayer):
    def forward(self, input: Tensor) -> Tensor:
        """The convolution with `whole_weight`."""
        conv_forward = cast(Any, self)._conv_forward  # of nn.Conv1d or nn.Conv2d: handles padding modes
        return cast(Tensor, conv_forward(input, self.whole_weight(), self.bias))


class PartialConv1d(_PartialConv, nn.Conv1d):
    """nn.Conv1d plus ``partial`` (c_out, number of channels, k)."""


class PartialConv2d(_PartialConv, nn.Conv2d):
    """nn.Conv2d plus ``partial`` (c_out, number of channels, k_h, k_w)."""


class PartialLinear(PartialLayer, nn.Linear):
    """nn.Linear plus ``partial`` (out_features, number of channels)."""

    def forward(self, input: Tensor) -> Tensor:
        """The linear map with `whole_weight`."""
        return nn.functional.linear(input, self.whole_weight(), self.bias)


PARTIAL: dict[type[nn.Module], type[PartialLayer]] = {
    nn.Conv1d: PartialConv1d,
    nn.Conv2d: PartialConv2d,
    nn.Linear: PartialLinear,
}


def take_channels(layer: nn.Module, connections: Partial) -> PartialLayer:
    """Turn ``layer`` into its partial class **in place**; `release_channels` undoes it.

    ``partial`` starts at ``weight[:, channels]``, so that nothing changes yet.

    >>> conv = nn.Conv2d(8, 4, 3)
    >>> before = conv(torch.ones(1, 8, 5, 5))
    >>> layer = take_channels(conv, Partial("", "weight", "partial", (4, 8, 3, 3), 1, (1, 6)))
    >>> torch.equal(layer(torch.ones(1, 8, 5, 5)), before), tuple(layer.partial.shape)
    (True, (4, 2, 3, 3))

    Raises TypeError for anything but a plain nn.Conv1d, nn.Conv2d or nn.Linear.
    """
    kind = PARTIAL.get(base_of(type(layer)))
    if kind is None:
        raise TypeError(f"only plain nn.Conv1d, nn.Conv2d and nn.Linear train in part, got {type(layer).__name__}")
    start = cast(Tensor, layer.weight).detach()[:, list(connections.channels)].clone()
    made: PartialLayer = recast(layer, kind if type(layer) in PARTIAL else sister_class(kind, type(layer)))
    made.connections, made.partial = connections, nn.Parameter(start)
    return made


def release_channels(layer: PartialLayer) -> nn.Module:
    """Turn ``layer`` back into the plain one it was, in place; ``partial`` is gone, ``weight`` untouched."""
    del layer.partial, layer.connections
    return cast(nn.Module, recast(layer, plain_class(type(layer))))


def merge_channels(layer: PartialLayer) -> nn.Module:
    """`release_channels`, but ``weight`` takes the trained channels, in place. There is no way back.

    >>> conv = nn.Linear(3, 2)
    >>> layer = take_channels(conv, Partial("", "weight", "partial", (2, 3), 1, (2,)))
    >>> type(merge_channels(layer)).__name__
    'Linear'
    """
    with torch.no_grad():
        cast(Tensor, layer.weight).copy_(layer.whole_weight())
    return release_channels(layer)
