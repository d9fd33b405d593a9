"""What becomes of batch normalisation while a network is trained: a stated policy (docs/artifact.md).

``frozen``: statistics are constants, also under ``module.train()``. ``batch``: batch statistics are used and the
running ones updated. ``recalibrate``: statistics are estimated anew by forward passes, then frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorac_deploy.lora_layers import recast
from lorac_deploy.structure import tensor_name
from lorac_deploy.timm_layers import base_of, plain_class, sister_class
from lorac_runtime.errors import DataError, listed
from lorac_runtime.manifest import BN_POLICIES, BnPolicy


class _Constant(_BatchNorm):
    """Stays in evaluation mode. A class, because a replaced method would be bound to the original in a deepcopy."""

    def train(self, mode: bool = True) -> Any:
        """Ignore ``mode``."""
        del mode
        return super().train(False)


class ConstantBatchNorm1d(_Constant, nn.BatchNorm1d):
    """nn.BatchNorm1d whose statistics are constants."""


class ConstantBatchNorm2d(_Constant, nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics are constants."""


class ConstantBatchNorm3d(_Constant, nn.BatchNorm3d):
    """nn.BatchNorm3d whose statistics are constants."""


_CONSTANT: dict[type[_BatchNorm], type[_Constant]] = {
    nn.BatchNorm1d: ConstantBatchNorm1d,
    nn.BatchNorm2d: ConstantBatchNorm2d,
    nn.BatchNorm3d: ConstantBatchNorm3d,
}


def apply_policy(module: nn.Module, policy: BnPolicy) -> tuple[str, ...]:
    """Hold every BN layer of ``module`` to a policy, in place; returns their names. `restore_policy` undoes it.

    Under ``frozen`` and ``recalibrate`` (call `recalibrate` for the estimation) the layers stay in evaluation mode
    whatever ``module.train()`` says. State dict, parameters and hooks are untouched.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> apply_policy(net, "frozen"), net.train()[1].training
    (('1',), False)
    >>> apply_policy(net, "batch"), net.train()[1].training
    (('1',), True)

    Raises ValueError for an unknown policy, or naming every BN layer that cannot be frozen.
    """
    if policy not in BN_POLICIES:
        raise ValueError(f"BN policy {policy!r} is not one of {', '.join(BN_POLICIES)}")
    if policy == "batch":
        return restore_policy(module)
    layers = _layers(module)
    _require_freezable(layers)
    for layer in layers.values():
        recast(layer, _constant_class(type(layer)) or type(layer)).eval()
    return tuple(layers)


def restore_policy(module: nn.Module) -> tuple[str, ...]:
    """Make every BN layer an ordinary one again, in ``module``'s own mode; returns their names."""
    layers = _layers(module)
    for layer in layers.values():
        kind = plain_class(type(layer)) if isinstance(layer, _Constant) else type(layer)
        recast(layer, kind).train(module.training)
    return tuple(layers)


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate all BN statistics anew by forward passes over ``batches`` (inputs), then freeze them, in place.

    Each statistic becomes the mean over the batches of what BN sees while it normalises with the batch itself:
    the mean, and the unbiased variance. Batches count the same whatever their size. Everything but BN runs in
    evaluation mode, and weights do not change. Returns the number of batches.

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> recalibrate(net, [torch.tensor([[1.0], [3.0]])]), net[0].running_mean
    (1, tensor([2.]))

    Raises ValueError if there is no batch or no BN layer; DataError if a statistic is not finite (NaN in the data).
    The statistics are then as before.
    """
    layers = _layers(module)
    _require_freezable(layers)
    if not layers:
        raise ValueError("this network has no batch normalisation to recalibrate")
    with _estimating(module, layers), torch.no_grad():
        count = 0
        for batch in batches:
            module(batch)
            count += 1
        _require_usable(layers, count)
    apply_policy(module, "frozen")
    return count


def bn_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of scale, shift, running mean and running variance of all BN layers, by state-dict key."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {
        tensor_name(name, leaf): value.detach().clone()
        for name, layer in _layers(module).items()
        for leaf in leaves
        if (value := getattr(layer, leaf)) is not None
    }


@contextlib.contextmanager
def _estimating(module: nn.Module, layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """BN layers, emptied, take the cumulative average of batch statistics; if the block fails, all is as before."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers.values()]
    before = [(value, value.clone()) for layer in layers.values() for value in layer.buffers()]
    module.eval()
    for layer in layers.values():
        layer.reset_running_stats()
        layer.training, layer.momentum = True, None  # None: cumulative average
    try:
        yield
    except BaseException:
        for value, old in before:
            value.copy_(old)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for part, training in modes:
            part.training = training


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}


def _constant_class(kind: type[_BatchNorm]) -> type[_Constant] | None:
    """The class that holds the statistics of such a layer constant; None where there is none."""
    if issubclass(kind, _Constant):
        return kind
    made = _CONSTANT.get(cast(type[_BatchNorm], base_of(kind)))
    return made if made is None or kind in _CONSTANT else sister_class(_Constant, kind)


def _require_freezable(layers: dict[str, _BatchNorm]) -> None:
    problems = []
    for name, layer in layers.items():
        if _constant_class(type(layer)) is None:
            problems.append(f"{name} is a {type(layer).__name__}, expected nn.BatchNorm1d, 2d or 3d")
        elif layer.running_mean is None:
            problems.append(f"{name} keeps no running statistics (track_running_stats=False)")
    if problems:
        raise ValueError(listed("these batch normalisations cannot be frozen:", problems))


def _require_usable(layers: dict[str, _BatchNorm], count: int) -> None:
    if count == 0:
        raise ValueError("no batch was given: statistics cannot be estimated from nothing")
    bad = [name for name, layer in layers.items() if not all(torch.isfinite(v).all() for v in layer.buffers())]
    if bad:
        raise DataError(f"the statistics of {', '.join(bad[:3])} are not finite: does the data hold NaN or infinity?")
