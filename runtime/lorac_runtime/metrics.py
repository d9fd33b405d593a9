"""Figures of how well a network answers: classes of samples or pixels, or numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lorac_runtime.tasks import LABELS, REGRESSION, SEGMENTATION, VALUES, Task

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Figures:
    """``accuracy``: the share of samples, or of pixels with a label, that are classified rightly. ``mean_iou``: the
    mean over classes of the intersection of answers and labels, divided by their union. ``error``: the mean absolute
    difference. Each is None where it does not apply.
    """

    accuracy: float | None = None
    mean_iou: float | None = None
    error: float | None = None


class Meter(Protocol):
    """Sums up batches."""

    def add(self, output: Array, targets: Array | Mapping[str, Array]) -> None:
        """A batch: the network's first output, and what it should have been."""

    def figures(self) -> Figures:
        """Of all batches."""


def meter_of(task: Task | None) -> Meter:
    """What measures a task; None is classification."""
    if task is None:
        return Accuracy()
    if task.kind == SEGMENTATION:
        return Overlap(task.classes, task.ignore_index)
    return Error() if task.kind == REGRESSION else Nothing()


class Accuracy:
    """Of the largest logit."""

    def __init__(self) -> None:
        self._right, self._count = 0, 0

    def add(self, output: Array, targets: Array | Mapping[str, Array]) -> None:
        """See `Meter`; targets are labels (n,)."""
        self._right += int(np.count_nonzero(output.argmax(axis=1) == targets))
        self._count += len(output)

    def figures(self) -> Figures:
        """See `Meter`."""
        return Figures(accuracy=self._right / self._count)


class Overlap:
    """Counts pixels by label and answer; those with the label ``ignore`` play no part.

    >>> meter = Overlap(2, 255)
    >>> scores = np.array([[[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]])                      # answers 0, 1, 1
    >>> meter.add(scores, {"labels": np.array([[[0, 1, 255]]])})
    >>> meter.figures().accuracy, meter.figures().mean_iou
    (1.0, 1.0)
    """

    def __init__(self, classes: int, ignore: int | None) -> None:
        self.counts = np.zeros((classes, classes), np.int64)  # [label, answer]
        self._ignore = ignore

    def add(self, output: Array, targets: Array | Mapping[str, Array]) -> None:
        """See `Meter`; targets hold labels (n, height, width)."""
        assert isinstance(targets, Mapping)
        labels, answers = targets[LABELS].astype(np.int64), output.argmax(axis=1)
        kept = np.ones(labels.shape, np.bool_) if self._ignore is None else labels != self._ignore
        places = labels[kept] * len(self.counts) + answers[kept]
        self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)

    def figures(self) -> Figures:
        """See `Meter`; classes that neither occur nor are answered do not count, and without a pixel there is none."""
        hits = np.diagonal(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        if not union.any():
            return Figures()
        shares = hits[union > 0] / union[union > 0]
        return Figures(accuracy=float(hits.sum() / self.counts.sum()), mean_iou=float(shares.mean()))


class Error:
    """The mean absolute difference."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, output: Array, targets: Array | Mapping[str, Array]) -> None:
        """See `Meter`; targets hold values of the output's shape."""
        assert isinstance(targets, Mapping)
        self._sum += float(np.abs(output.astype(np.float64) - targets[VALUES]).sum())
        self._count += output.size

    def figures(self) -> Figures:
        """See `Meter`."""
        return Figures(error=self._sum / self._count)


class Nothing:
    """Of a loss that only its maker knows."""

    def add(self, output: Array, targets: Array | Mapping[str, Array]) -> None:
        """See `Meter`."""

    def figures(self) -> Figures:
        """See `Meter`."""
        return Figures()
