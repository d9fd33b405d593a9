"""Time to a target accuracy: fine-tuning on scikit-learn's digits in the dark, epoch by epoch.

A ResNet-20 is trained on clean digits once. Every method then trains on drifted ones with its own peak learning rate,
in the same order and schedule with every engine; images that no training saw are classified after each epoch, outside
of what is timed. Time counts from raw images in memory; loading and compiling lie before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import step_competitors as sc
from benchmarks.command import RESULTS, Say
from benchmarks.finetune_cases import BENCHMARK, Point, Settings, noted, refused, row, shortened
from benchmarks.interpreters import PROJECT
from benchmarks.rows import Row
from benchmarks.step_cases import Case
from benchmarks.step_competitors import FLOOR, Competitor
from benchmarks.step_process import Session, WorkerError, Workers
from benchmarks.step_protocol import Run
from benchmarks.step_rounds import LOSS_TOLERANCE
from benchmarks.step_torch_epochs import Images, accuracy
from lorac_deploy.checkpoint import CONFIG, Checkpoint, load_checkpoint, save_checkpoint
from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import Dataset, input_spec, load_dataset
from lorac_deploy.lora import fuse
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.train_config import TrainConfig
from lorac_deploy.trainer import train
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.manifest import TrainingDefaults

MODEL, DATA, DRIFT, SEVERITY = "resnet20", "digits", "low_light", 4
BATCH, THREADS = 32, 2
LOCAL = 320  # images to train with: whole batches, or a compiled network is compiled again for the last one
TARGET = 0.8
EPOCHS, QUICK_EPOCHS = 10, 3
BASE = TrainConfig(epochs=5, bn_policy="batch", threads=2)
QUICK_BASE = dataclasses.replace(BASE, epochs=2)
MEASURED = {"time to target": "s", "accuracy": "%"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: the point that rows are of, files to train with and to test on, epochs at most."""

    point: Point
    local: Path
    test: Path
    epochs: int

    def run(self, competitor: Competitor) -> Run:
        """All epochs, with the method's own peak learning rate."""
        lr = sc.VARIANTS[competitor.variant].settings.lr
        warmup = TrainingDefaults.warmup
        return Run(str(self.local), self.epochs, BATCH, lr=lr, warmup=warmup, test=str(self.test), target=TARGET)


def rows(settings: Settings, workers: Workers, *, say: Say) -> list[Row]:
    """Every method and engine, one after the other."""
    say(f"target: {MODEL} on {DATA}")
    base = checkpoint(RESULTS, QUICK_BASE if settings.quick else BASE, say)
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(MODEL, Path(scratch) / MODEL, spec=base.input, module=base.module)
        task = prepared(Path(scratch), competitors(quick=settings.quick), QUICK_EPOCHS if settings.quick else EPOCHS)
        found: dict[str, Any] = {}
        made = [base_row(task, base)]
        for competitor in task.point.competitors:
            made += competitor_rows(task, case, workers, competitor, found)
            say(f"target: {competitor.label}: {_said(made[-2:])}")
        return made


def base_row(task: Task, base: Checkpoint) -> Row:
    """The accuracy before any fine-tuning."""
    share = accuracy(base.module, Images(str(task.test), base.input))
    return Row(
        benchmark=BENCHMARK,
        model=MODEL,
        format="torch",
        runtime=PROJECT,
        variant="base",
        quantity="accuracy",
        figure=100 * share,
        unit="%",
        settings=task.point.settings,
        details={"clean, held out": base.metrics},
        note="before fine-tuning",
    )


def competitors(*, quick: bool) -> tuple[Competitor, ...]:
    """Those that make epochs; compiled are the two that train all layers."""
    if quick:
        return tuple(c for c in sc.QUICK if c.label != FLOOR)
    compiled = sc.chosen("PyTorch compiled, lora-c", "PyTorch compiled, full")
    return (*sc.of("ours,", "onnxruntime-training,", "PyTorch,"), *compiled)


def prepared(folder: Path, competitors: tuple[Competitor, ...], epochs: int) -> Task:
    """Digits that the base did not see, in the dark: some to train with, the others to test on."""
    digits = load_dataset(DATA, split="test")
    images = corrupt(digits.images, DRIFT, SEVERITY)
    for name, part in (("local", slice(LOCAL)), ("test", slice(LOCAL, None))):
        np.savez(folder / f"{name}.npz", images=images[part], labels=digits.labels[part])
    swept = (("target", round(100 * TARGET)), ("images", LOCAL))
    point = Point(MODEL, BATCH, THREADS, competitors, swept=swept)
    return Task(point, folder / "local.npz", folder / "test.npz", epochs)


def checkpoint(folder: Path, config: TrainConfig, say: Say) -> Checkpoint:
    """The network trained on clean digits, kept in ``folder`` under the settings that made it."""
    settings = json.dumps([MODEL, DATA, dataclasses.asdict(config)], sort_keys=True)
    out = folder / f"base-{DATA}-{MODEL}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if not (out / CONFIG).is_file():
        say(f"target: training {MODEL} on clean {DATA}, once; it is kept in {out}")
        _train(out, load_dataset(DATA), config)
    return load_checkpoint(out)


def _train(out: Path, data: Dataset, config: TrainConfig) -> None:
    spec = ModelSpec(MODEL, classes=len(data.class_names))
    module, given = build(spec), input_spec(data.images)
    report = train(module, data, input_spec=given, method="full", config=config)
    metrics = {"val_accuracy": report.val_accuracy or 0.0}
    save_checkpoint(out, fuse(module), spec, input_spec=given, class_names=data.class_names, metrics=metrics)


def competitor_rows(
    task: Task, case: Case, workers: Workers, competitor: Competitor, found: dict[str, Any]
) -> Iterator[Row]:
    """Both rows of a competitor; ``found`` holds what the reference found, which came first."""
    try:
        session = workers.open(competitor, case, batch=BATCH, threads=THREADS)
        session.ask("step", count=2)  # so that nobody pays for what a library does once
        told = session.ask("epochs", run=dataclasses.asdict(task.run(competitor)))
        session.ask("close")
    except (WorkerError, FileNotFoundError, RuntimeError, LoracDeployError) as err:
        yield from refused(task.point, competitor, str(err), MEASURED)
        return
    found.setdefault("reference", told)
    yield from _made(task, competitor, session, told, found["reference"])


def _made(
    task: Task, competitor: Competitor, session: Session, told: dict[str, Any], reference: dict[str, Any]
) -> Iterator[Row]:
    accuracies, first = told["accuracies"], told["first_loss"]
    sound = math.isclose(first, reference["first_loss"], rel_tol=LOSS_TOLERANCE)
    notes = [competitor.note, session.note]
    notes += [] if sound else [f"another first loss ({first:.6g}): not the same training"]
    notes += _compiling(session)
    details = {"epochs": len(accuracies), "seconds": told["seconds"], "accuracies": accuracies}
    details |= {"losses": told["losses"], "peak lr": task.run(competitor).lr}
    reached = accuracies[-1] >= TARGET
    missed = f"not reached in {task.epochs} epochs: {100 * accuracies[-1]:.1f} %"
    for quantity, figure in (
        ("time to target", sum(told["seconds"]) if reached else None),
        ("accuracy", 100 * accuracies[-1]),
    ):
        made = row(task.point, competitor, quantity, figure, MEASURED[quantity])
        note = noted(*notes, *([missed] if figure is None else []))
        compared = _ratio(quantity, figure, reference) if sound else {}
        yield dataclasses.replace(made, details=details, note=shortened(note), **compared)


def _compiling(session: Session) -> list[str]:
    seconds = session.facts.get("compile")
    return [] if seconds is None else [f"compiling took {seconds:.0f} s more"]


def _ratio(quantity: str, figure: float | None, reference: dict[str, Any]) -> dict[str, Any]:
    """A time as a multiple of the reference's, where both got there."""
    if quantity == "accuracy" or figure is None or reference["accuracies"][-1] < TARGET:
        return {}
    return {"ratio": figure / sum(reference["seconds"]), "reference": sc.REFERENCE}


def _said(made: list[Row]) -> str:
    return ", ".join(f"{r.quantity} {r.note if r.figure is None else f'{r.figure:.2f} {r.unit}'}" for r in made)
