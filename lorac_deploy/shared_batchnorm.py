"""Batch normalisation over a batch that is spread over several processes: the statistics of the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorac_deploy.lora_layers import recast
from lorac_deploy.timm_layers import base_of, behind_norm, sister_class


class _Summed(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return _sum(value)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient)


class _Shared(_BatchNorm):
    """Takes mean and variance over the parts of all processes; running statistics follow them everywhere alike."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (n, channels, ...); in evaluation mode as ever."""
        if not self.training:
            return super().forward(input)
        normalised: Tensor = behind_norm(self)(self._normalised(input))
        return normalised

    def _normalised(self, input: Tensor) -> Tensor:
        """``input`` normalised by the statistics of all processes, which the running ones follow."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        axes, shape = [0, *range(2, input.ndim)], [1, -1] + [1] * (input.ndim - 2)
        part = input.float()
        number = part.new_tensor([part.numel() / part.shape[1]])
        sums = _summed(torch.cat([part.sum(axes), number]))
        count = sums[-1].item()
        mean = sums[:-1] / count
        centred = part - mean.view(shape)
        variance = _summed(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps) * (1 if self.weight is None else self.weight)
        shift = 0 if self.bias is None else self.bias.view(shape)
        return (centred * scale.view(shape) + shift).to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as `torch.nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    """nn.BatchNorm1d over several processes."""


class SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    """nn.BatchNorm2d over several processes."""


class SharedBatchNorm3d(_Shared, nn.BatchNorm3d):
    """nn.BatchNorm3d over several processes."""


_SHARED: dict[type[nn.Module], type[_Shared]] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
}


@contextlib.contextmanager
def shared_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block the BN layers of ``module`` share their batch statistics over all processes.

    Layers whose statistics are constants, and layers of classes of neither PyTorch nor timm, are left as they are.
    """
    layers = [(part, type(part)) for part in module.modules() if base_of(type(part)) in _SHARED]
    for layer, plain in layers:
        recast(layer, _shared_class(plain))
    try:
        yield
    finally:
        for layer, plain in layers:
            if type(layer) is _shared_class(plain):
                recast(layer, plain)


def _shared_class(kind: type[nn.Module]) -> type[nn.Module]:
    return _SHARED[kind] if kind in _SHARED else sister_class(_Shared, kind)


def _summed(value: Tensor) -> Tensor:
    summed: Tensor = _Summed.apply(value)  # type: ignore[no-untyped-call]
    return summed


def _sum(value: Tensor) -> Tensor:
    total = value.contiguous().clone()
    torch.distributed.all_reduce(total)
    return total
