"""Losses by name, in PyTorch as on a device (`lorac_exporters.gradients.losses`): means over images.

>>> import torch
>>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
>>> round(float(LOSSES["entropy"](logits, torch.tensor([0, 1]))), 4)             # the mean of log 2 and 0
0.3466
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lorac_deploy.train_config import TrainConfig
from lorac_runtime.tasks import IGNORED, REGRESSION, SEGMENTATION

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (n, classes), labels int64 (n,) -> ()
NO_LABEL = -100  # torch's own; no class has it
DistilledLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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


def focal(logits: Tensor, labels: Tensor, gamma: float, ignore: int = NO_LABEL) -> Tensor:
    """The mean over what has a label of -(1 - p)^gamma * log p (Lin et al., arXiv 1708.02002, without alpha)."""
    surprise = functional.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")
    losses = (1 - torch.exp(-surprise)) ** gamma * surprise
    return losses.sum() / (labels != ignore).sum().clamp(min=1)


def distillation(
    logits: Tensor, labels: Tensor, base: Tensor, *, weight: float, temperature: float, ignore: int = NO_LABEL
) -> Tensor:
    """(1 - weight) * cross-entropy + weight * temperature^2 * KL(base || logits), both means over all positions."""
    losses = functional.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")
    soft, known = ((values / temperature).log_softmax(1) for values in (logits, base))
    divergence = functional.kl_div(soft, known, reduction="none", log_target=True).sum(1)
    return (1 - weight) * losses.mean() + weight * temperature**2 * divergence.mean()


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over pixels with a label; 0 where there is none."""
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def loss_of(config: TrainConfig, task: str) -> DistilledLoss:
    """What training lowers: a function of logits, labels, and of what the base answers (None but for distillation)."""
    ignore = IGNORED if task == SEGMENTATION else NO_LABEL
    if config.loss == "focal":
        return lambda logits, labels, _base: focal(logits, labels, config.focal_gamma, ignore)
    if config.loss == "distillation":
        weight, temperature = config.distillation_weight, config.temperature
        return lambda logits, labels, base: distillation(
            logits, labels, _given(base), weight=weight, temperature=temperature, ignore=ignore
        )
    if task == REGRESSION:
        plain: Loss = functional.l1_loss if config.loss == "l1" else functional.mse_loss
    elif task == SEGMENTATION and config.loss == "cross_entropy":
        plain = labelled_cross_entropy
    else:
        plain = LOSSES[config.loss]
    return lambda logits, labels, _base: plain(logits, labels)


def _given(base: Tensor | None) -> Tensor:
    if base is None:
        raise ValueError("the loss distillation needs what the base answers")
    return base


LOSSES: dict[str, Loss] = {
    "cross_entropy": functional.cross_entropy,
    "mse": mean_squared_error,
    "binary_cross_entropy": binary_cross_entropy,
    "entropy": entropy,
}
