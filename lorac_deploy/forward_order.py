"""In which order a PyTorch network calls its layers, and the sizes of the feature maps that they take and give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lorac_exporters.plan import Network, Size, layer_of

REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AssertionError,
)  # of networks, for samples they do not take


def with_sizes(network: Network, module: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """``network``, the facts about ``module``, with `Network.order` and the sizes of its convolutions filled in.

    One sample of zeros of shape ``input_shape``, such as (channels, height, width), goes through ``module`` in
    evaluation mode. Nothing of the module changes. Layers that the forward pass does not call are in no order.

    >>> from lorac_deploy.structure import describe
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 2))
    >>> with_sizes(describe(net), net, (3, 8, 8)).order
    (('0', (3, 3)), ('1', (3, 3)), ('3', None))

    Raises ValueError if the network cannot process such a sample.
    """
    calls = _calls(module, input_shape)
    convs = tuple(dataclasses.replace(c, **dataclasses.asdict(calls.get(c.name, _Call()))) for c in network.convs)
    order = tuple((layer, call.size_out) for layer, call in calls.items())
    return dataclasses.replace(network, convs=convs, order=order)


def said(err: Exception) -> str:
    """What a network's own code says of a sample that it refuses, which may be nothing.

    >>> said(AssertionError())
    'its own code raised AssertionError; another size may do'
    """
    return str(err) or f"its own code raised {type(err).__name__}; another size may do"


@dataclasses.dataclass(frozen=True)
class _Call:
    """Spatial sizes at a layer's first call; None where it takes no feature map, or was not called."""

    size_in: Size | None = None
    size_out: Size | None = None


def _calls(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, _Call]:
    """Layers with parameters in the order of their first calls."""
    found: dict[str, _Call] = {}
    handles = [handle for name, part in _layers(module) for handle in _watched(name, part, found)]
    like = next(module.parameters())
    try:
        with _evaluation(module), torch.no_grad():
            module(torch.zeros((1, *input_shape), dtype=like.dtype, device=like.device))
    except REFUSALS as err:
        raise ValueError(f"the network cannot process a sample of shape {input_shape}: {said(err)}") from err
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of those that hold parameters; one with other names than weight and bias holds layers of these."""
    for prefix, part in module.named_modules():
        names = (f"{prefix}.{name}" if prefix else name for name, p in part._parameters.items() if p is not None)
        yield from ((layer, part) for layer in dict.fromkeys(layer_of(name) for name in names))


def _watched(name: str, part: nn.Module, found: dict[str, _Call]) -> Iterator[Any]:
    """Hooks that note the first call: its place when it begins, its sizes when it ends."""

    def begin(*_: object) -> None:
        found.setdefault(name, _Call())

    def end(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found[name] == _Call():
            found[name] = _Call(_size(inputs[0]), _size(output))

    yield part.register_forward_pre_hook(begin)
    if isinstance(part, _ConvNd | _BatchNorm):
        yield part.register_forward_hook(end)


def _size(value: Any) -> Size | None:
    return tuple(value.shape[2:]) if isinstance(value, Tensor) else None


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Every part in evaluation mode; afterwards each is as it was."""
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = False
        yield
    finally:
        for part, training in before:
            part.training = training
