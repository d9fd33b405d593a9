"""Settings of a training run in PyTorch, and what each method starts from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any, Literal

from lorac_exporters.methods import METHODS
from lorac_exporters.methods.method import Method
from lorac_runtime.manifest import BN_POLICIES, LOSSES, BnPolicy

Optimizer = Literal["adamw", "sgd"]
Augment = Literal["none", "crop", "crop-flip"]
Keep = Literal["best", "last"]
Precision = Literal["auto", "no", "fp16", "bf16"]
LOSS_SETTINGS = {"focal_gamma": "focal", "distillation_weight": "distillation", "temperature": "distillation"}
PEAK_LR: dict[Optimizer, float] = {"adamw": 1e-3, "sgd": 0.05}


def _shown(text: str, *choices: str) -> dict[str, Any]:
    """What the command line shows of a field: its help text and choices."""
    return {"help": text, "choices": choices}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the command line's options are these fields. `DEFAULTS` has one for each method.

    ``lr`` is the peak of a linear warm-up over ``warmup`` (fraction of all steps) and a cosine decay; None takes
    `PEAK_LR` of the optimizer. Of epochs with equal validation accuracy ``keep="best"`` takes the latest.

    Raises ValueError naming every value out of range.

    >>> TrainConfig(optimizer="sgd").peak_lr, TrainConfig(lr=0.5).peak_lr
    (0.05, 0.5)
    """

    epochs: int = field(default=10, metadata=_shown("passes over the training images"))
    batch_size: int = field(default=32, metadata=_shown("images per step, at most"))
    optimizer: Optimizer = field(default="adamw", metadata=_shown("how steps are made", "adamw", "sgd"))
    lr: float | None = field(
        default=None, metadata=_shown("peak learning rate; unless given, 0.001 with adamw and 0.05 with sgd")
    )
    momentum: float = field(default=0.9, metadata=_shown("of sgd; beta1 of adamw"))
    weight_decay: float = field(default=5e-4, metadata=_shown("on tensors of more than one dimension"))
    warmup: float = field(
        default=0.3, metadata=_shown("share of all steps in which the learning rate rises, 0 to 1; then it falls to 0")
    )
    clip_norm: float = field(default=1.0, metadata=_shown("largest norm of the gradient, 0 for no limit"))
    bn_policy: BnPolicy = field(
        default="frozen",
        metadata=_shown(
            "batch normalisation: constants, batch statistics, or constants estimated anew on the training images",
            *BN_POLICIES,
        ),
    )
    loss: str = field(
        default="cross_entropy",
        metadata=_shown("what training lowers; entropy is that of the outputs and makes no use of labels", *LOSSES),
    )
    focal_gamma: float = field(default=2.0, metadata=_shown("exponent of the loss focal"))
    distillation_weight: float = field(
        default=0.5,
        metadata=_shown("share of the loss distillation that is for the answers of the network it starts from, 0 to 1"),
    )
    temperature: float = field(default=2.0, metadata=_shown("that softens answers, of the loss distillation"))
    augment: Augment = field(
        default="none",
        metadata=_shown(
            "shift images by up to an eighth of each side (crop), and mirror half of them (crop-flip)",
            *("none", "crop", "crop-flip"),
        ),
    )
    val_fraction: float = field(
        default=0.1, metadata=_shown("share of the training images, by class, held out to watch and choose by")
    )
    keep: Keep = field(
        default="best", metadata=_shown("the epoch with the best validation accuracy, or the last", "best", "last")
    )
    seed: int = field(
        default=0, metadata=_shown("of the split, the order of images, augmentation, dropout and first values")
    )
    threads: int | None = field(
        default=None, metadata=_shown("of PyTorch; another number may change the last digits of the results")
    )

    precision: Precision = field(
        default="auto",
        metadata=_shown(
            "of forward and backward passes: float32 (no), or mixed with 16-bit numbers, which needs the extra "
            "`accelerate`; auto is what `accelerate launch` says, no without it",
            *("auto", "no", "fp16", "bf16"),
        ),
    )

    def __post_init__(self) -> None:
        problems = [*_number_problems(self), *_choice_problems(self)]
        if self.keep == "best" and self.val_fraction == 0:
            problems.append("keep is 'best', which needs validation images (val_fraction above 0), or keep 'last'")
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
        ("lr", c.lr, c.lr is None or (math.isfinite(c.lr) and c.lr > 0), "a positive number"),
        ("momentum", c.momentum, 0 <= c.momentum < 1, "0 or more and below 1"),
        ("weight_decay", c.weight_decay, 0 <= c.weight_decay < math.inf, "0 or more"),
        ("warmup", c.warmup, 0 <= c.warmup <= 1, "0 to 1"),
        ("clip_norm", c.clip_norm, 0 <= c.clip_norm < math.inf, "0 or more"),
        ("focal_gamma", c.focal_gamma, c.focal_gamma == 0 or 1 <= c.focal_gamma < math.inf, "0, or 1 and more"),
        ("distillation_weight", c.distillation_weight, 0 < c.distillation_weight < 1, "above 0 and below 1"),
        ("temperature", c.temperature, 0 < c.temperature < math.inf, "a positive number"),
        ("val_fraction", c.val_fraction, 0 <= c.val_fraction < 1, "0 or more and below 1"),
        ("seed", c.seed, 0 <= c.seed < 2**63, "0 or more"),
        ("threads", c.threads, c.threads is None or c.threads >= 1, "at least 1"),
    )
    return [f"{name} is {value}, expected {wanted}" for name, value, fits, wanted in limits if not fits]


def _choice_problems(c: TrainConfig) -> list[str]:
    choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(c) if f.metadata["choices"]}
    given = {name: getattr(c, name) for name in choices}
    return [
        f"{name} is {value!r}, expected one of {', '.join(choices[name])}"
        for name, value in given.items()
        if value not in choices[name]
    ]


def _of(method: Method) -> dict[str, Any]:
    """What a method says of its training here and on a device; the usual learning rate is left to the optimizer."""
    found: dict[str, Any] = {"bn_policy": method.policy(), "loss": method.loss_of()}
    return found if method.lr == PEAK_LR["adamw"] else found | {"lr": method.lr}


_OWN: dict[str, dict[str, Any]] = {  # what a method does otherwise
    "full": {"epochs": 5, "bn_policy": "batch"},
    "tent": {"keep": "last"},  # the best epoch could only be told by labels
}
DEFAULTS: dict[str, TrainConfig] = {
    name: TrainConfig(**(_of(method) | _OWN.get(name, {}))) for name, method in METHODS.items()
}
