"""What a network consists of, as the methods see it: stem, convolutions, head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lorac_deploy.lora_layers import ADAPTED


@dataclass(frozen=True)
class Network:
    """A module with the names of its convolutions (in definition order), its stem and its head.

    The stem is the first convolution **in the order of definition**, which is the forward order in the networks
    of `lorac_deploy.models`; a network that defines its layers in another order names its stem.
    """

    module: nn.Module
    convolutions: dict[str, _ConvNd]
    stem: str | None
    head: str

    @property
    def parameters(self) -> int:
        """Elements of all parameters, each counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def backbone_parameters(self) -> int:
        """Elements of all parameters but the head's."""
        return self.parameters - sum(p.numel() for p in self.module.get_submodule(self.head).parameters())


def tensor_name(layer: str, tensor: str) -> str:
    """State-dict key of a layer's tensor; the root module's name is empty.

    >>> tensor_name("layer1.0.conv1", "weight"), tensor_name("", "weight")
    ('layer1.0.conv1.weight', 'weight')
    """
    return f"{layer}.{tensor}" if layer else tensor


def describe(module: nn.Module, *, stem: str | None = None, head: str | None = None) -> Network:
    """Find convolutions, stem and head of a network; ``stem`` and ``head`` name them where the rules are wrong.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    >>> found = describe(net)
    >>> found.stem, found.head, list(found.convolutions)
    ('0', '3', ['0', '1'])

    Raises ValueError if there is no head, or a given name is not that of a fitting layer.
    """
    layers = dict(module.named_modules())
    head_name = find_head(module, head)
    convolutions = {n: m for n, m in layers.items() if isinstance(m, _ConvNd) and n != head_name}
    if stem is None:
        stem = next(iter(convolutions), None)
    elif stem not in convolutions:
        raise ValueError(f"stem {stem!r} is not a convolution of this network: {_some(convolutions)}")
    return Network(module, convolutions, stem, head_name)


def find_head(module: nn.Module, name: str | None = None) -> str:
    """Name of the classifying layer: the last nn.Linear, else a last convolution with a 1x1 kernel.

    >>> find_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1)))
    '1'

    Raises ValueError if there is none, or ``name`` is not a linear layer or a 1x1 convolution.
    """
    layers = dict(module.named_modules())
    candidates = [n for n, m in layers.items() if _can_be_head(m)]
    if name is not None and name not in candidates:
        raise ValueError(f"head {name!r} is not a linear layer or 1x1 convolution: {_some(candidates)}")
    if name is not None:
        return name
    linear = [n for n in candidates if isinstance(layers[n], nn.Linear)]
    convolutions = [n for n, m in layers.items() if isinstance(m, _ConvNd)]
    if linear or (convolutions and convolutions[-1] in candidates):
        return linear[-1] if linear else convolutions[-1]
    raise ValueError(
        "this network ends neither in a linear layer nor in a 1x1 convolution, so its head cannot be found: "
        f"name the classifying layer with head=...; {_some(candidates)}"
    )


def unadaptable(network: Network) -> dict[str, str]:
    """The convolutions that cannot hold an adapter, each with the reason.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 10))
    >>> unadaptable(describe(net))
    {'1': 'transposed convolutions take no adapter'}
    """
    owners: dict[int, list[str]] = {}
    for name, module in network.module.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons = {name: _reason(name, conv, owners) for name, conv in network.convolutions.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(name: str, conv: _ConvNd, owners: dict[int, list[str]]) -> str | None:
    if "weight" not in conv._parameters:
        return "its weight is computed by a parametrization, which an adapter would bypass"
    others = [n for n in owners[id(conv.weight)] if n != name]
    if others:
        return f"its weight is shared with {', '.join(others)}"
    if isinstance(conv, _ConvTransposeNd):
        return "transposed convolutions take no adapter"
    if type(conv) not in ADAPTED:
        return f"{type(conv).__name__} takes no adapter: only plain nn.Conv1d and nn.Conv2d do"
    return None


def _can_be_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1
    )


def _some(names: dict[str, _ConvNd] | list[str]) -> str:
    listed = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
    return f"candidates are {listed}" if names else "it has no candidate"
