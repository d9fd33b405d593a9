"""Losses by name, in PyTorch as on a device (`lorac_exporters.gradients.losses`): means over images.

>>> import torch
>>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
>>> round(float(LOSSES["entropy"](logits, torch.tensor([0, 1]))), 4)             # the mean of log 2 and 0
0.3466
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (n, classes), labels int64 (n,) -> ()


def entropy(logits: Tensor, _labels: Tensor) -> Tensor:
    """The mean Shannon entropy, in nats, of softmax(logits) (n, classes); labels play no part (TENT, equation 1)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of (logits - one-hot labels)^2."""
    return functional.mse_loss(logits, _one_hot(logits, labels))


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over images and classes of the cross-entropy of sigmoid(logits) and the one-hot labels."""
    return functional.binary_cross_entropy_with_logits(logits, _one_hot(logits, labels))


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, logits.shape[1]).to(logits.dtype)


LOSSES: dict[str, Loss] = {
    "cross_entropy": functional.cross_entropy,
    "mse": mean_squared_error,
    "binary_cross_entropy": binary_cross_entropy,
    "entropy": entropy,
}
