"""Settings of a training run in PyTorch, and what each method starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorac_runtime.manifest import BN_POLICIES, BnPolicy

Optimizer = Literal["adamw", "sgd"]
Augment = Literal["none", "crop", "crop-flip"]
Keep = Literal["best", "last"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sgd")
AUGMENTS: tuple[Augment, ...] = ("none", "crop", "crop-flip")
KEEPS: tuple[Keep, ...] = ("best", "last")
PEAK_LR: dict[Optimizer, float] = {"adamw": 1e-3, "sgd": 0.05}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `DEFAULTS` has one for each method.

    ``lr``: peak of a linear warm-up over ``warmup`` (fraction of all steps), then a cosine decay; None takes
    `PEAK_LR` of the optimizer. ``momentum``: SGD's, or AdamW's beta1. ``weight_decay``: on tensors of more than
    one dimension only. ``clip_norm``: largest norm of the gradient, 0 for no limit. ``bn_policy``: what becomes of
    batch normalisation. ``augment``: ``crop`` shifts by up to an eighth of each side, ``crop-flip`` mirrors half of
    the images too. ``val_fraction``: held out of the training images, to watch and to choose by. ``keep``: the epoch
    with the best validation accuracy (the latest of equals), or the last one. ``threads``: of PyTorch, None as it
    is; their number may change the last digits.

    Raises ValueError naming every value out of range.

    >>> TrainConfig(optimizer="sgd").peak_lr, TrainConfig(lr=0.5).peak_lr
    (0.05, 0.5)
    """

    epochs: int = 10
    batch_size: int = 32
    optimizer: Optimizer = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.3
    clip_norm: float = 1.0
    bn_policy: BnPolicy = "frozen"
    augment: Augment = "none"
    val_fraction: float = 0.1
    keep: Keep = "best"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = [*_number_problems(self), *_choice_problems(self)]
        if self.keep == "best" and self.val_fraction == 0:
            problems.append("keep is 'best', which needs validation images (val_fraction above 0), or keep='last'")
        if problems:
            raise ValueError("these training settings cannot be used: " + "; ".join(problems))

    @property
    def peak_lr(self) -> float:
        """``lr``, or the optimizer's default."""
        return PEAK_LR[self.optimizer] if self.lr is None else self.lr


def _number_problems(c: TrainConfig) -> list[str]:
    limits = (
        ("epochs", c.epochs, c.epochs >= 1, "at least 1"),
        ("batch_size", c.batch_size, c.batch_size >= 1, "at least 1"),
        ("lr", c.lr, c.lr is None or (math.isfinite(c.lr) and c.lr > 0), "positive"),
        ("momentum", c.momentum, 0 <= c.momentum < 1, "from 0 to below 1"),
        ("weight_decay", c.weight_decay, 0 <= c.weight_decay < math.inf, "0 or more"),
        ("warmup", c.warmup, 0 <= c.warmup <= 1, "a fraction, 0 to 1"),
        ("clip_norm", c.clip_norm, 0 <= c.clip_norm < math.inf, "0 or more"),
        ("val_fraction", c.val_fraction, 0 <= c.val_fraction < 1, "a fraction below 1"),
        ("seed", c.seed, 0 <= c.seed < 2**63, "0 or more"),
        ("threads", c.threads, c.threads is None or c.threads >= 1, "at least 1"),
    )
    return [f"{name} is {value}, expected {wanted}" for name, value, fits, wanted in limits if not fits]


def _choice_problems(c: TrainConfig) -> list[str]:
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("optimizer", c.optimizer, OPTIMIZERS),
        ("bn_policy", c.bn_policy, BN_POLICIES),
        ("augment", c.augment, AUGMENTS),
        ("keep", c.keep, KEEPS),
    )
    return [f"{n} is {v!r}, expected one of {', '.join(allowed)}" for n, v, allowed in choices if v not in allowed]


DEFAULTS: dict[str, TrainConfig] = {
    "full": TrainConfig(epochs=5, bn_policy="batch"),
    "head": TrainConfig(),
    "lora-c": TrainConfig(),
}
