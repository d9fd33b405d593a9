"""timm's subclasses of PyTorch's layers, seen as what they are: a plain layer with something in front or behind.

Nothing here imports timm: who holds one of its layers has imported it. ``BatchNormAct2d`` is a batch normalisation
with an activation behind it, ``Conv2dSame`` a convolution that pads as TensorFlow does, ``Linear`` is nn.Linear.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn

_BASES: dict[str, type[nn.Module]] = {
    "BatchNormAct2d": nn.BatchNorm2d,
    "Conv2dSame": nn.Conv2d,
    "Linear": nn.Linear,
}


def base_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of PyTorch whose parameters, buffers and meaning a layer of class ``kind`` has; else ``kind`` itself.

    >>> base_of(nn.Conv2d).__name__
    'Conv2d'
    """
    known = [base for name, base in _BASES.items() if _class(name) is kind]
    return known[0] if known else kind


def behind_norm(norm: nn.Module) -> nn.Module:
    """What a batch normalisation does after it has normalised, scaled and shifted: nothing, or an activation.

    >>> behind_norm(nn.BatchNorm2d(3))
    Identity()
    """
    kind = _class("BatchNormAct2d")
    if kind is None or not isinstance(norm, kind):
        return nn.Identity()
    own: Any = norm
    return nn.Sequential(own.drop, own.act)


def is_traceable(kind: type[nn.Module]) -> bool:
    """Whether torch.fx can look inside a layer of class ``kind``, as far as timm says.

    >>> is_traceable(nn.ReLU)
    True
    """
    layers: Any = sys.modules.get("timm.layers")
    return layers is None or not layers.is_notrace_module(kind)


def sister_class(made: type[Any], kind: type[nn.Module]) -> type[Any]:
    """``made``, a class of ours beside a class of PyTorch, as it is beside timm's ``kind``; `plain_class` undoes it.

    >>> sister_class(nn.Identity, nn.ReLU).__name__
    'IdentityOfReLU'
    """
    sister: type[Any] = _SISTERS(made, kind)
    return sister


def _made(made: type[Any], kind: type[nn.Module]) -> type[Any]:
    own = {"_conv_forward": _same_conv_forward} if kind.__name__ == "Conv2dSame" else {}
    return type(f"{made.__name__}Of{kind.__name__}", (made, kind), {"__doc__": made.__doc__, **own})


_SISTERS: Any = functools.cache(_made)  # one class for each pair; Any: mypy takes a module's class for unhashable


def plain_class(made: type[nn.Module]) -> type[nn.Module]:
    """The class beside which a class of ours stands: its last base.

    >>> plain_class(sister_class(nn.Identity, nn.ReLU)).__name__
    'ReLU'
    """
    return made.__bases__[-1]


def _class(name: str) -> type[nn.Module] | None:
    return getattr(sys.modules.get("timm.layers"), name, None)


def _same_conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What nn.Conv2d calls the convolution with any weight, padded as timm's Conv2dSame pads."""
    layers: Any = sys.modules["timm.layers"]
    padded = layers.pad_same(input, list(weight.shape[-2:]), self.stride, self.dilation)
    return nn.functional.conv2d(padded, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
