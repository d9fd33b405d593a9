"""How well networks for segmentation and regression do, and which of two results is better."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lorac_deploy.acceleration import ALONE, Acceleration
from lorac_deploy.batches import ordered_batches
from lorac_deploy.data import Dataset
from lorac_runtime.manifest import InputSpec
from lorac_runtime.metrics import Overlap
from lorac_runtime.tasks import CLASSIFICATION, IGNORED, LABELS, REGRESSION, SEGMENTATION

BATCH = 16  # maps take more memory than classes do


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a report calls accuracy: its name, and whether a larger value is better."""

    name: str
    larger: bool = True

    def no_worse(self, one: float, other: float) -> bool:
        """Whether ``one`` is at least as good."""
        return one >= other if self.larger else one <= other

    def text(self, value: float) -> str:
        """For a person.

        >>> METRICS["classification"].text(0.5), METRICS["segmentation"].text(0.5)
        ('50.0%', '0.500')
        """
        return f"{value:.1%}" if self.name == "accuracy" else f"{value:.3f}" if self.larger else f"{value:.4g}"


METRICS = {
    CLASSIFICATION: Metric("accuracy"),
    SEGMENTATION: Metric("mean IoU"),
    REGRESSION: Metric("mean absolute error", larger=False),
}


def evaluate_task(
    module: nn.Module, dataset: Dataset, spec: InputSpec, *, acceleration: Acceleration = ALONE
) -> tuple[float, float]:
    """(mean loss, metric) in evaluation mode; ``module`` keeps its mode.

    Of segmentation the cross-entropy, and the mean intersection over union of `lorac_runtime.metrics`; of regression
    the mean absolute error twice.
    """
    training = module.training
    module.eval()
    overlap, loss, count = Overlap(max(1, len(dataset.class_names)), IGNORED), 0.0, 0
    with torch.no_grad():
        for images, labels in acceleration.every(ordered_batches(dataset, spec, BATCH)):
            outputs = acceleration.outputs(module, images).cpu()
            if dataset.task == REGRESSION:
                loss, count = loss + float((outputs - labels).abs().sum()), count + labels.numel()
                continue
            losses = functional.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction="sum")
            loss, count = loss + float(losses), count + int((labels != IGNORED).sum())
            overlap.add(outputs.numpy(), {LABELS: labels.numpy()})
    module.train(training)
    loss, total, *counts = acceleration.total(loss, float(count), *overlap.counts.ravel().astype(float))
    overlap.counts = np.array(counts, np.int64).reshape(overlap.counts.shape)
    mean = loss / max(1.0, total)
    return mean, mean if dataset.task == REGRESSION else float(overlap.figures().mean_iou or 0.0)
