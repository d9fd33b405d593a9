"""The training loop: batches in a seeded order, the learning rate of each step, and a watch on the loss."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.config import Settings
from lorac_runtime.data import LocalData, preprocess
from lorac_runtime.engines.engine import Engine, Labels
from lorac_runtime.errors import DivergenceError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.metrics import Figures, meter_of
from lorac_runtime.schedule import one_cycle
from lorac_runtime.tasks import Task, weight_of

Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands after a step. ``epoch`` and ``step`` count from 1, ``step`` over all epochs.

    ``loss`` is the mean of this epoch's steps so far; ``seconds`` is what training has taken, checkpoints left out.

    >>> p = Progress(epoch=1, epochs=2, step=2, steps=8, loss=0.7, lr=1e-3, seconds=3.0)
    >>> p.eta, p.epoch_done
    (9.0, False)
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float

    @property
    def eta(self) -> float:
        """Seconds that the remaining steps will take."""
        return self.seconds / self.step * (self.steps - self.step)

    @property
    def epoch_done(self) -> bool:
        """Whether this was the epoch's last step."""
        return self.step * self.epochs == self.epoch * self.steps


EXPLODED = 5.0  # a mean loss so many times that of the first step, and of random answers, is no training any more
OnProgress = Callable[[Progress], None]
Pause = Callable[[], bool]  # whether to stop after the step that was just taken


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean loss, and how well the answers were (`lorac_runtime.metrics.Figures`); figures are None without labels."""

    loss: float
    accuracy: float | None
    mean_iou: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class History:
    """What has happened after ``epoch`` whole epochs and ``position`` steps of the next one.

    ``losses`` and ``step_seconds`` have a value per step, ``epoch_losses`` one per whole epoch.
    """

    epoch: int = 0
    losses: tuple[float, ...] = ()
    epoch_losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    seconds: float = 0.0
    before: Evaluation | None = None
    position: int = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some of the local images (``index``), as batches that ``spec`` and the BN policy allow.

    With ``merge_single`` a last batch of one image joins the one before it: alone it may have no variance. ``task``
    (None: classification) and ``loss`` say how batches weigh in the mean loss, and what is measured.
    """

    data: LocalData
    index: Indices
    spec: InputSpec
    batch_size: int
    merge_single: bool = False
    task: Task | None = None
    loss: str = "cross_entropy"

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, order: Indices | None = None) -> list[Indices]:
        """Indices of each batch; the last one may be smaller. ``order`` permutes the samples.

        >>> data = LocalData(np.zeros((5, 1, 1, 1), np.uint8), np.zeros(5, np.int64))
        >>> samples = Samples(data, np.arange(5), InputSpec("x", (1, 1, 1), 1.0, (0.0,), (1.0,)), 2)
        >>> [len(b) for b in samples.batches()]
        [2, 2, 1]
        >>> [len(b) for b in dataclasses.replace(samples, merge_single=True).batches()]
        [2, 3]
        """
        index = self.index if order is None else self.index[order]
        starts = list(range(0, len(index), self.batch_size))
        if self.merge_single and len(starts) > 1 and len(index) - starts[-1] == 1:
            starts.pop()
        return [index[a:b] for a, b in zip(starts, [*starts[1:], len(index)], strict=True)]

    def images(self, batch: Indices) -> npt.NDArray[Any]:
        """Those of a batch, as the model takes them."""
        return preprocess(self.data.images[batch], self.spec)

    def labels(self, batch: Indices) -> Labels | None:
        """Those of a batch, or the targets of another task by name; None where the data have none."""
        if self.data.targets:
            return {name: values[batch] for name, values in self.data.targets.items()}
        return None if self.data.labels is None else self.data.labels[batch]

    @property
    def labelled(self) -> bool:
        """Whether the data have labels, or targets."""
        return self.data.labels is not None or bool(self.data.targets)


Inputs = Callable[[Samples, Indices], Mapping[str, npt.NDArray[Any]]]  # what a step takes for a batch of samples


def computed(engine: Engine) -> Inputs:
    """Inputs that the engine computes from the images each time that they are asked for."""
    return lambda samples, batch: engine.inputs(samples.images(batch))


def evaluate(engine: Engine, samples: Samples, inputs: Inputs | None = None) -> Evaluation:
    """How the engine's model does on some samples, at least one, as it stands; changes nothing."""
    inputs, meter = inputs or computed(engine), meter_of(samples.task)
    loss, total = 0.0, 0.0
    for batch in samples.batches():
        labels = samples.labels(batch)
        batch_loss, logits = engine.eval_step(inputs(samples, batch), labels)
        weight = weight_of(samples.task, samples.loss, labels, slice(None), len(batch))
        loss, total = loss + batch_loss * weight, total + weight
        if labels is not None:
            meter.add(logits, labels)
    figures = meter.figures() if samples.labelled else Figures()
    return Evaluation(loss / (total or 1.0), figures.accuracy, figures.mean_iou, figures.error)


def train_epoch(
    engine: Engine,
    samples: Samples,
    settings: Settings,
    history: History,
    *,
    on_progress: OnProgress,
    inputs: Inputs | None = None,
    pause: Pause | None = None,
) -> History:
    """The rest of an epoch, in an order that depends on seed and epoch alone; returns the longer history.

    ``inputs`` None computes what the engine takes anew for each batch. ``pause`` is asked after each step whether to
    stop there; given the history that was returned, the next call goes on with the step after it.
    Raises DivergenceError as soon as a loss is not finite.
    """
    order = np.random.default_rng([settings.seed, history.epoch]).permutation(len(samples))
    batches = samples.batches(order)
    steps, started = settings.epochs * len(batches), time.perf_counter() - history.seconds
    losses = list(history.losses[len(history.losses) - history.position :])
    durations: list[float] = []
    for batch in batches[history.position :]:
        step = history.epoch * len(batches) + len(losses)
        lr = one_cycle(step, steps, peak=settings.lr, warmup=settings.warmup)
        loss, duration = _timed_step(engine, samples, batch, lr, inputs or computed(engine))
        if not math.isfinite(loss):
            raise DivergenceError(diverged(f"the loss became {loss} in step {step + 1} of {steps}", settings))
        losses.append(loss)
        durations.append(duration)
        seconds = time.perf_counter() - started
        on_progress(Progress(history.epoch + 1, settings.epochs, step + 1, steps, _mean(losses), lr, seconds))
        if pause is not None and pause():
            break
    longer = dataclasses.replace(
        history,
        position=len(losses),
        losses=(*history.losses, *losses[history.position :]),
        step_seconds=(*history.step_seconds, *durations),
        seconds=time.perf_counter() - started,
    )
    return longer if len(losses) < len(batches) else _whole(longer, _mean(losses))


def _whole(history: History, loss: float) -> History:
    """At the end of an epoch whose mean loss was ``loss``."""
    epoch_losses = (*history.epoch_losses, loss)
    return dataclasses.replace(history, epoch=history.epoch + 1, position=0, epoch_losses=epoch_losses)


def exploded(history: History, classes: int) -> bool:
    """Whether the mean loss of the last whole epoch is far above where it began and above that of random answers.

    Never where there are no ``classes``: what a loss should be is then not known.

    >>> exploded(History(1, (2.0, 90.0), (46.0,)), 10), exploded(History(1, (2.0, 3.0), (2.5,)), 10)
    (True, False)
    """
    if not history.epoch_losses:
        return False
    return bool(classes) and history.epoch_losses[-1] > EXPLODED * max(history.losses[0], math.log(classes))


def diverged(what: str, settings: Settings) -> str:
    """The message for a run that diverged: ``what`` happened, and what to do about it."""
    return (
        f"{what}: training diverged at a peak learning rate of {settings.lr:g}. No result was written. "
        f"Begin anew (--restart) with a lower one, such as --lr {settings.lr / 3:.1g}"
    )


def _timed_step(engine: Engine, samples: Samples, batch: Indices, lr: float, inputs: Inputs) -> tuple[float, float]:
    """(loss, seconds from the images to the new weights)."""
    started = time.perf_counter()
    loss = engine.train_step(inputs(samples, batch), samples.labels(batch), lr)
    return loss, time.perf_counter() - started


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
