"""The modules of methods ``skip`` and ``attention`` on a PyTorch network: parameters on its layers, used by hooks.

A module's parameters are registered on the layer whose input it reads, so that their state-dict keys are the names that
a graph has; the layer's own tensors, class and keys stay. A hook reads the parameters of the layer that calls it, so a
deep copy of a network works on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lorac_exporters.modules import skips
from lorac_exporters.modules.insertion import UNIFORM
from lorac_exporters.plan import SiteModule

_CONVOLUTIONS: dict[int, Any] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(eq=False)
class _Sum:
    """What the skip adapters of one network add to its logits, by layer, during a forward pass."""

    sites: tuple[str, ...]
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, layer: str, part: Tensor) -> None:
        if layer in self.parts:
            raise ValueError(f"{layer} is called twice in a forward pass: a skip adapter needs one input a pass")
        self.parts[layer] = part

    def take(self) -> Tensor:
        missing = [layer for layer in self.sites if layer not in self.parts]
        if missing:
            raise ValueError(f"{', '.join(missing)} did not run before the head: their skip adapters have no input")
        total = self.parts[self.sites[0]]
        for layer in self.sites[1:]:
            total = total + self.parts[layer]
        self.parts.clear()
        return total


@dataclass(eq=False)
class _Start:
    """Before the network: forget what a forward pass that failed has left."""

    total: _Sum

    def __call__(self, network: nn.Module, args: Any) -> None:
        del network, args
        self.total.parts.clear()


@dataclass(eq=False)
class _Skip:
    """Before a layer: its part of the sum. No gradient flows back into the network."""

    layer: str
    scale: float
    total: _Sum

    def __call__(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        hidden = functional.linear(pooled(layer, args[0].detach()), layer.skip_a)
        self.total.add(self.layer, self.scale * functional.linear(hidden, layer.skip_b))


@dataclass(eq=False)
class _AddSkips:
    """Behind the head: logits plus the sum."""

    total: _Sum

    def __call__(self, head: nn.Module, args: Any, logits: Tensor) -> Tensor:
        del head, args
        return logits + self.total.take()


@dataclass(eq=False)
class _Gates:
    """Before a layer: the gates on its input."""

    def __call__(self, layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        hidden = functional.relu(functional.linear(pooled(layer, x), layer.gate_down, layer.gate_down_bias))
        channels = 2 * torch.sigmoid(functional.linear(hidden, layer.gate_up, layer.gate_up_bias))
        ones = [1] * (x.ndim - 2)
        shape = (*channels.shape, *ones) if isinstance(layer, _ConvNd) else (len(x), *ones, channels.shape[1])
        gated = x * channels.reshape(shape)
        if hasattr(layer, "gate_space"):
            logits = _CONVOLUTIONS[x.ndim](x, layer.gate_space, layer.gate_space_bias)
            gated = gated * (2 * torch.sigmoid(logits))
        return (gated, *rest)


_HOOKS = (_Start, _Skip, _AddSkips, _Gates)


def add_modules(
    network: nn.Module, modules: Sequence[SiteModule], *, head: str, generator: torch.Generator | None = None
) -> None:
    """Put ``modules`` on ``network``, in place; nothing changes in its outputs yet. `remove_modules` undoes it."""
    total = _Sum(tuple(module.layer for module in modules))
    for module in modules:
        layer: Any = network.get_submodule(module.layer)
        for tensor in module.tensors:
            start = _starting(tensor.name, tensor.shape, generator)
            layer.register_parameter(_leaf(tensor.name), nn.Parameter(start.to(layer.weight)))
        hook = _Skip(module.layer, module.scale, total) if module.kind == skips.KIND else _Gates()
        layer.register_forward_pre_hook(hook)
    if any(module.kind == skips.KIND for module in modules):
        network.register_forward_pre_hook(_Start(total), prepend=True)
        network.get_submodule(head).register_forward_hook(_AddSkips(total))


def remove_modules(network: nn.Module, modules: Sequence[SiteModule]) -> None:
    """Take them off again, in place; their parameters are gone."""
    for module in modules:
        layer = network.get_submodule(module.layer)
        for tensor in module.tensors:
            delattr(layer, _leaf(tensor.name))
    for part in network.modules() if modules else ():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]


def pooled(layer: nn.Module, x: Tensor) -> Tensor:
    """The mean of a layer's input over its positions: (N, channels, ...), or (N, ..., features), to (N, channels).

    What a convolution pads by copying, an exported graph pads in front of it; there the mean is of the padded input.

    >>> pooled(nn.Conv2d(2, 4, 3), torch.ones(1, 2, 5, 5))
    tensor([[1., 1.]])
    """
    if not isinstance(layer, _ConvNd):
        return x if x.ndim == 2 else x.mean(tuple(range(1, x.ndim - 1)))
    if layer.padding_mode != "zeros":
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return x.mean(tuple(range(2, x.ndim)))


def _starting(name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """As `lorac_exporters.modules.insertion.starting_numbers`, from PyTorch's generator."""
    bound = 1 / math.sqrt(math.prod(shape[1:])) if name.endswith(UNIFORM) else 0.0
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
