"""A training run as an object that stands between two epochs: it can be saved, and go on elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lorac_deploy.acceleration import ALONE, Acceleration
from lorac_deploy.batches import batch_count, ordered_batches, training_batches
from lorac_deploy.batchnorm import apply_policy, recalibrate
from lorac_deploy.data import Dataset, split_validation
from lorac_deploy.losses import loss_of
from lorac_deploy.task_evaluation import METRICS, evaluate_task
from lorac_deploy.train_checks import require_batches, require_parts
from lorac_deploy.train_config import TrainConfig
from lorac_deploy.training_report import EpochRecord, Progress
from lorac_deploy.training_state import (
    FORMAT,
    RunFacts,
    Tensors,
    TrainingState,
    optimizer_tensors,
    restore_optimizer,
)
from lorac_runtime.errors import DivergenceError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.schedule import one_cycle
from lorac_runtime.tasks import BY_LABELLED_PIXEL, CLASSIFICATION, IGNORED, SEGMENTATION

EVALUATION_BATCH = 128

OnProgress = Callable[[Progress], None]


class Run:
    """Training of a prepared ``module`` (`lorac_deploy.lora.select_trainable`), in place.

    ``base`` is what the loss distillation compares with, in evaluation mode.
    """

    def __init__(
        self,
        module: nn.Module,
        dataset: Dataset,
        spec: InputSpec,
        *,
        config: TrainConfig,
        on_progress: OnProgress | None = None,
        acceleration: Acceleration = ALONE,
        base: nn.Module | None = None,
    ) -> None:
        self.acceleration, self.base = acceleration, base
        self.task, self.loss = dataset.task, loss_of(config, dataset.task)
        self.module, self.spec, self.config, self.on_progress = module, spec, config, on_progress
        self.train: Dataset = dataset
        self.val: Dataset | None = None
        if config.val_fraction:
            self.train, self.val = split_validation(dataset, config.val_fraction, config.seed)
        self.steps = batch_count(len(self.train), config.batch_size)
        require_parts(len(self.train) // self.steps, acceleration.processes)
        if apply_policy(module, config.bn_policy):
            require_batches(len(self.train), self.steps, config)
        self.names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.epochs = config.epochs if self.names else 0
        self.optimizer = make_optimizer(list(self.names), config) if self.names else None
        self.stepper = None if self.optimizer is None else acceleration.optimizing(self.optimizer)
        self.history: list[EpochRecord] = []
        self.kept: Tensors = {}
        self.kept_epoch = 0
        self.accuracy_before: float | None = None

    def begin(self) -> None:
        """What happens before the first epoch; it is all of a run in which nothing trains."""
        if self.val is not None:
            self.accuracy_before = self._evaluate(self.val)[1]
        if self.config.bn_policy == "recalibrate":
            batches = ordered_batches(self.train, self.spec, self.config.batch_size)
            recalibrate(self.module, (images.to(self.acceleration.device) for images, _ in batches))
        self.kept = self._snapshot()

    def epoch(self) -> None:
        """One epoch of training, and its validation. Raises DivergenceError."""
        number, start = len(self.history) + 1, time.perf_counter()
        loss = self._train(number)
        val_loss, accuracy = (None, None) if self.val is None else self._evaluate(self.val)
        self._require_finite(val_loss)
        self.history.append(EpochRecord(number, loss, val_loss, accuracy, time.perf_counter() - start))
        self._keep(number, accuracy)
        if accuracy is not None:
            self._tell(number, self.steps, loss, accuracy)

    def state(self, who: dict[str, str]) -> TrainingState:
        """All that `restore` needs."""
        facts = RunFacts(FORMAT, who, tuple(self.history), self.kept_epoch, self.accuracy_before)
        kept = {} if self.kept_epoch == len(self.history) else self.kept
        optimizer = {} if self.optimizer is None else optimizer_tensors(self.optimizer, self.names)
        return TrainingState(facts, self.module.state_dict(), kept, optimizer)

    def restore(self, state: TrainingState) -> None:
        """Go on where `state` was taken."""
        self.module.load_state_dict(state.model)
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, self.names, state.optimizer)
        self.history, self.kept = list(state.facts.history), state.kept or self._snapshot()
        self.kept_epoch, self.accuracy_before = state.facts.kept_epoch, state.facts.accuracy_before

    def take_kept(self) -> None:
        """Put the kept weights into the module."""
        self.module.load_state_dict(self.kept)

    def val_accuracy(self) -> float | None:
        """Of the weights that are kept, on the validation images; None without any."""
        if self.history:
            return self.history[self.kept_epoch - 1].val_accuracy
        return None if self.val is None else self._evaluate(self.val)[1]

    def _evaluate(self, dataset: Dataset) -> tuple[float, float]:
        return evaluate(self.module, dataset, self.spec, acceleration=self.acceleration)

    def _train(self, number: int) -> float:
        """Mean loss of the epoch."""
        config, total = self.config, 0.0
        self.module.train()
        batches = training_batches(
            self.train,
            self.spec,
            batch_size=config.batch_size,
            augment=config.augment,
            seed=config.seed,
            epoch=number,
        )
        with self.acceleration.forked_rng():
            # Dropout is the same however the run came to this epoch.
            seeds = self.acceleration.seeds(config.seed, number)
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            for step, (images, labels) in enumerate(batches, 1):
                loss = self._step(images, labels, self._rate(number, step))
                total += loss * len(labels)  # of masks with little in them as of others
                self._tell(number, step, loss, None)
        return total / len(self.train)

    def _step(self, images: Tensor, labels: Tensor, rate: float) -> float:
        assert self.optimizer is not None
        assert self.stepper is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        part, expected = self.acceleration.part(images, labels)
        share, parameters = self._share(expected, labels), list(self.names)
        loss = self.loss(self.acceleration.outputs(self.module, part), expected, self._answers(part))
        (value,) = self.acceleration.total(loss.item() * share)
        self._require_finite(value)
        self.optimizer.zero_grad()
        self.acceleration.backward(loss, parameters, share)
        if self.config.clip_norm:
            self.acceleration.clip(parameters, self.config.clip_norm)
        self.stepper.step()
        return value

    def _share(self, part: Tensor, whole: Tensor) -> float:
        """How much a part of a batch weighs in its mean loss: its samples, or its pixels with a label."""
        if self.task == SEGMENTATION and self.config.loss in BY_LABELLED_PIXEL:
            return int((part != IGNORED).sum()) / max(1, int((whole != IGNORED).sum()))
        return len(part) / len(whole)

    def _answers(self, images: Tensor) -> Tensor | None:
        """What the base answers; None where no loss asks for it."""
        if self.base is None:
            return None
        with torch.no_grad():
            return self.acceleration.outputs(self.base, images)

    def _rate(self, number: int, step: int) -> float:
        config, done = self.config, (number - 1) * self.steps + step - 1
        return one_cycle(done, config.epochs * self.steps, peak=config.peak_lr, warmup=config.warmup)

    def _tell(self, number: int, step: int, loss: float, accuracy: float | None) -> None:
        if self.on_progress is not None:
            rate = self._rate(number, step)
            self.on_progress(Progress(number, self.config.epochs, step, self.steps, loss, rate, accuracy))

    def _keep(self, number: int, accuracy: float | None) -> None:
        best = self.history[self.kept_epoch - 1].val_accuracy if self.kept_epoch else None
        last = self.config.keep == "last" or best is None or accuracy is None
        if last or METRICS[self.task].no_worse(float(accuracy or 0), float(best or 0)):
            self.kept_epoch, self.kept = number, self._snapshot()

    def _snapshot(self) -> Tensors:
        return {name: value.clone() for name, value in self.module.state_dict().items()}

    def _require_finite(self, loss: float | None) -> None:
        if loss is not None and not math.isfinite(loss):
            config = self.config
            raise DivergenceError(
                f"training diverged: the loss became {loss} in epoch {len(self.history) + 1}, with a peak learning "
                f"rate of {config.peak_lr:g}. Lower it (--lr {config.peak_lr / 10:g}), warm up longer (--warmup), or "
                "clip gradients harder (--clip-norm)"
            )


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay on tensors of more than one dimension only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.momentum, 0.999))


def evaluate(
    module: nn.Module, dataset: Dataset, spec: InputSpec, *, acceleration: Acceleration = ALONE
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (fraction) in evaluation mode; ``module`` keeps its mode.

    Of segmentation both are over pixels with a label, and the mean intersection over union stands for the accuracy; of
    regression both are the mean absolute error.

    >>> from lorac_deploy.data import input_spec
    >>> images = np.zeros((4, 8, 8, 1), np.uint8)
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> _ = nn.init.zeros_(net[1].weight), nn.init.zeros_(net[1].bias)
    >>> loss, accuracy = evaluate(net, Dataset(images, np.array([0, 0, 0, 1]), ("a", "b")), input_spec(images))
    >>> round(loss, 4), accuracy
    (0.6931, 0.75)
    """
    if dataset.task != CLASSIFICATION:
        return evaluate_task(module, dataset, spec, acceleration=acceleration)
    training = module.training
    module.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for images, labels in acceleration.every(ordered_batches(dataset, spec, EVALUATION_BATCH)):
            logits = acceleration.outputs(module, images).cpu()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    module.train(training)
    loss, found = acceleration.total(loss, right)
    return loss / len(dataset), found / len(dataset)
