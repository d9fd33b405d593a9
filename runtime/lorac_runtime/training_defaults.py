"""How a device trains unless it is told otherwise."""

from __future__ import annotations

import dataclasses

from lorac_runtime.tasks import LOSSES_OF

OPTIMIZERS = ("adamw", "sgd")
LOSSES = tuple(dict.fromkeys(loss for kind, losses in LOSSES_OF.items() for loss in losses if kind != "custom"))


@dataclasses.dataclass(frozen=True)
class TrainingDefaults:
    """Defaults of the device's fine-tuning, chosen so that no tuning is needed (docs/decisions).

    ``lr`` is the peak of a linear warm-up over ``warmup`` (fraction of all steps) followed by a cosine decay
    to zero; gradients are clipped to the norm ``clip_norm`` inside the optimizer graph (0: no limit).

    ``optimizer`` is one of `OPTIMIZERS`, ``loss`` one of `LOSSES`, or "graph" where the artifact's maker gave one.
    ``focal_gamma`` is the exponent of the loss focal (Lin et al., arXiv 1708.02002, equation 4, without alpha).
    ``temperature`` and ``distillation_weight`` are those of the loss distillation: (1 - weight) * cross-entropy +
    weight * temperature^2 * KL(base || adapted), of softened answers. Of the other fields, named and meant as in
    torch.optim, ``momentum``, ``dampening`` and ``nesterov`` are sgd's, ``betas``, ``eps`` and ``amsgrad`` adamw's.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_size: int = 32
    epochs: int = 10
    warmup: float = 0.3
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    focal_gamma: float = 2.0
    temperature: float = 2.0
    distillation_weight: float = 0.5
