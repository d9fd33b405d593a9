"""A training run as an object that stands between two epochs: it can be saved, and go on elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lorac_deploy.batches import batch_count, ordered_batches, training_batches
from lorac_deploy.batchnorm import apply_policy, recalibrate
from lorac_deploy.data import Dataset, split_validation
from lorac_deploy.train_checks import require_batches
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

EVALUATION_BATCH = 128

OnProgress = Callable[[Progress], None]


class Run:
    """Training of a prepared ``module`` (`lorac_deploy.lora.select_trainable`), in place."""

    def __init__(
        self,
        module: nn.Module,
        dataset: Dataset,
        spec: InputSpec,
        *,
        config: TrainConfig,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.module, self.spec, self.config, self.on_progress = module, spec, config, on_progress
        self.train: Dataset = dataset
        self.val: Dataset | None = None
        if config.val_fraction:
            self.train, self.val = split_validation(dataset, config.val_fraction, config.seed)
        self.steps = batch_count(len(self.train), config.batch_size)
        if apply_policy(module, config.bn_policy):
            require_batches(len(self.train), self.steps, config)
        self.names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.names), config)
        self.history: list[EpochRecord] = []
        self.kept: Tensors = {}
        self.kept_epoch = 0
        self.accuracy_before: float | None = None

    def begin(self) -> None:
        """What happens before the first epoch."""
        if self.config.bn_policy == "recalibrate":
            batches = ordered_batches(self.train, self.spec, self.config.batch_size)
            recalibrate(self.module, (images for images, _ in batches))
        if self.val is not None:
            self.accuracy_before = evaluate(self.module, self.val, self.spec)[1]

    def epoch(self) -> None:
        """One epoch of training, and its validation. Raises DivergenceError."""
        number, start = len(self.history) + 1, time.perf_counter()
        loss = self._train(number)
        val_loss, accuracy = (None, None) if self.val is None else evaluate(self.module, self.val, self.spec)
        self._require_finite(val_loss)
        self.history.append(EpochRecord(number, loss, val_loss, accuracy, time.perf_counter() - start))
        self._keep(number, accuracy)
        if accuracy is not None:
            self._tell(number, self.steps, loss, accuracy)

    def state(self, who: dict[str, str]) -> TrainingState:
        """All that `restore` needs."""
        facts = RunFacts(FORMAT, who, tuple(self.history), self.kept_epoch, self.accuracy_before)
        kept = {} if self.kept_epoch == len(self.history) else self.kept
        optimizer = optimizer_tensors(self.optimizer, self.names)
        return TrainingState(facts, self.module.state_dict(), kept, optimizer)

    def restore(self, state: TrainingState) -> None:
        """Go on where `state` was taken."""
        self.module.load_state_dict(state.model)
        restore_optimizer(self.optimizer, self.names, state.optimizer)
        self.history, self.kept = list(state.facts.history), state.kept or self._snapshot()
        self.kept_epoch, self.accuracy_before = state.facts.kept_epoch, state.facts.accuracy_before

    def take_kept(self) -> None:
        """Put the kept weights into the module."""
        self.module.load_state_dict(self.kept)

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
        with torch.random.fork_rng(devices=[]):
            # Dropout is the same however the run came to this epoch.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]))
            for step, (images, labels) in enumerate(batches, 1):
                loss = self._step(images, labels, self._rate(number, step))
                total += loss * len(labels)
                self._tell(number, step, loss, None)
        return total / len(self.train)

    def _step(self, images: Tensor, labels: Tensor, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = nn.functional.cross_entropy(self.module(images), labels)
        value = loss.item()
        self._require_finite(value)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(list(self.names), self.config.clip_norm)
        self.optimizer.step()
        return value

    def _rate(self, number: int, step: int) -> float:
        config, done = self.config, (number - 1) * self.steps + step - 1
        return one_cycle(done, config.epochs * self.steps, peak=config.peak_lr, warmup=config.warmup)

    def _tell(self, number: int, step: int, loss: float, accuracy: float | None) -> None:
        if self.on_progress is not None:
            rate = self._rate(number, step)
            self.on_progress(Progress(number, self.config.epochs, step, self.steps, loss, rate, accuracy))

    def _keep(self, number: int, accuracy: float | None) -> None:
        best = self.history[self.kept_epoch - 1].val_accuracy if self.kept_epoch else None
        if self.config.keep == "last" or best is None or accuracy is None or accuracy >= best:
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


def evaluate(module: nn.Module, dataset: Dataset, spec: InputSpec) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (fraction) in evaluation mode; ``module`` keeps its mode.

    >>> from lorac_deploy.data import input_spec
    >>> images = np.zeros((4, 8, 8, 1), np.uint8)
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> _ = nn.init.zeros_(net[1].weight), nn.init.zeros_(net[1].bias)
    >>> loss, accuracy = evaluate(net, Dataset(images, np.array([0, 0, 0, 1]), ("a", "b")), input_spec(images))
    >>> round(loss, 4), accuracy
    (0.6931, 0.75)
    """
    training = module.training
    module.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for images, labels in ordered_batches(dataset, spec, EVALUATION_BATCH):
            logits = module(images)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    module.train(training)
    return loss / len(dataset), right / len(dataset)
