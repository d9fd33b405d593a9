"""What `lorac-deploy train` shows while it runs, and in the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:  # they import PyTorch
    from lorac_deploy.training_report import Progress, TrainReport


class Display:
    """A progress bar over all epochs, and a line for each."""

    def __init__(self, console: Console, task: str) -> None:
        from lorac_deploy.task_evaluation import METRICS

        self._metric = METRICS[task]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, p: Progress) -> None:
        """Show a step; after validation, a line that stays."""
        text = f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.4f}"
        done = (p.epoch - 1) * p.steps + p.step
        self._bar.update(self._task, description=text, completed=done, total=p.epochs * p.steps)
        if p.val_accuracy is not None:
            self._bar.console.print(f"{text}  validation {self._metric.text(p.val_accuracy)}")


def show(report: TrainReport, saved: Path, console: Console) -> None:
    """Print what a training did."""
    from lorac_deploy.task_evaluation import METRICS

    metric = next(found for found in METRICS.values() if found.name == report.metric)
    name = "" if metric.name == "accuracy" else f"{metric.name} "
    table = Table(show_header=False, title=str(saved))
    share = report.trained_parameters / report.model_parameters
    table.add_row("trained", f"{report.trained_parameters:,} of {report.model_parameters:,} parameters ({share:.2%})")
    table.add_row("samples", f"{report.train_images} for training, {report.val_images} for validation")
    before, after = report.accuracy_before, report.val_accuracy
    if before is not None and after is not None:
        figures = f"{metric.text(before)} before, {metric.text(after)} after (epoch {report.kept_epoch})"
        table.add_row("validation", f"{name}{figures}")
    if report.test_accuracy is not None:
        table.add_row("test", f"{name}{metric.text(report.test_accuracy)} of images that played no part in training")
    table.add_row("time", f"{report.seconds:.1f} s")
    console.print(table)
