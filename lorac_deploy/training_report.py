"""What a training run reports: progress while it runs, a report and a plot when it is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lorac_runtime.files import atomic_write, staged

REPORT = "report.json"
PLOT = "plot.png"


@dataclasses.dataclass(frozen=True)
class Progress:
    """After each step. Steps and epochs count from 1; ``loss`` is that of the step's batch, ``lr`` its rate.

    ``val_accuracy`` (fraction) is there after the last step of an epoch, if images are held out.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    val_accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, and loss and accuracy (fraction) on the validation images, if there are any."""

    epoch: int
    loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """What a run did. Accuracies are fractions; ``seconds`` include those of a run that was resumed.

    ``kept_epoch`` is the epoch whose weights were kept. ``accuracy_before`` and ``val_accuracy`` are of the
    validation images, None without any; ``test_accuracy`` is of images that played no part in training. ``metric``
    says what they are: "accuracy", of segmentation "mean IoU", of regression "mean absolute error".
    """

    method: str
    bn_policy: str
    config: dict[str, int | float | str | tuple[str, ...] | None]
    train_images: int
    val_images: int
    trained_parameters: int
    model_parameters: int
    history: tuple[EpochRecord, ...]
    kept_epoch: int
    accuracy_before: float | None
    val_accuracy: float | None
    test_accuracy: float | None
    seconds: float
    metric: str = "accuracy"

    def to_json(self) -> str:
        """The text of report.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def save_report(report: TrainReport, folder: Path) -> None:
    """Write report.json, and the training curves as plot.png where matplotlib is installed. Raises OutputError."""
    atomic_write(folder / REPORT, report.to_json().encode())
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    with staged(folder / PLOT) as part:
        _plot(report, part)


def _plot(report: TrainReport, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    epochs = [record.epoch for record in report.history]
    left.plot(epochs, [record.loss for record in report.history], marker="o", label="training")
    if report.val_images:
        left.plot(epochs, [record.val_loss for record in report.history], marker="o", label="validation")
        factor = 100 if report.metric == "accuracy" else 1
        right.plot(epochs, [factor * (record.val_accuracy or 0) for record in report.history], marker="o")
    right.axvline(report.kept_epoch, linestyle=":", color="grey", label="kept")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel=f"validation {report.metric}" + (", %" if report.metric == "accuracy" else ""))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
