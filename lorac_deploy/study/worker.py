"""One cell of a study: fine-tune with the device's own runtime, and measure."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.quiet import quiet_runtime
from lorac_deploy.study.bench import CLEAN, Bench, accuracy, read_local, read_samples, write_local
from lorac_deploy.study.cells import Cell
from lorac_deploy.study_data import with_wrong
from lorac_exporters.costs import artifact_costs
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import LocalData
from lorac_runtime.engines import Engine
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.files import atomic_write
from lorac_runtime.manifest import Manifest, load
from lorac_runtime.outputs import FUSED
from lorac_runtime.session import finetune
from lorac_runtime.training import History, Indices, Inputs, Samples, evaluate


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a cell. Accuracies are shares of the test samples; ``failed`` says why there are none.

    ``curve`` holds (seconds of training, accuracy on drifted test samples) after each epoch; ``seconds`` is what all of
    the training took on one thread, ``costs`` those of `lorac_exporters.costs.StepCosts`.
    """

    method: str
    drift: str
    size: int
    wrong: float
    seed: int
    base_drifted: float
    base_clean: float
    drifted: float | None = None
    clean: float | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    cache_hits: int | None = None
    cache_misses: int | None = None
    curve: tuple[tuple[float, float], ...] = ()
    costs: dict[str, int] = dataclasses.field(default_factory=dict)
    failed: str | None = None


def run_cell(bench: Bench, cell: Cell) -> Row:
    """Run a cell and keep its row under the cell's key; what fails for the method is a row too."""
    artifact = bench.artifact(cell.method, cell.seed)
    row = Row(
        method=cell.method.name,
        drift=cell.drift.name,
        size=cell.size,
        wrong=cell.wrong,
        seed=cell.seed,
        base_drifted=json.loads(bench.base_accuracy(cell.drift).read_text()),
        base_clean=json.loads(bench.base_accuracy(CLEAN).read_text()),
        costs=dataclasses.asdict(artifact_costs(artifact)),
    )
    try:
        with quiet_runtime():
            row = _measured(bench, cell, artifact, row)
    except LoracDeployError as err:
        row = dataclasses.replace(row, failed=str(err))
    atomic_write(row_file(bench, cell), json.dumps(dataclasses.asdict(row), indent=1).encode())
    return row


def row_file(bench: Bench, cell: Cell) -> Path:
    """Where the row of a cell is kept."""
    return bench.out / "cells" / f"{cell.key(bench.sources)}.json"


def read_row(path: Path) -> Row | None:
    """A kept row; None where there is none yet, or it is of another version of this program."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Row(**raw | {"curve": tuple((a, b) for a, b in raw["curve"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


class Curve:
    """Called after each epoch, it takes the accuracy on test samples, where there are any.

    ``points`` are (seconds of training, accuracy), ``seconds`` those of all of the training.
    """

    def __init__(self, test: LocalData | None, manifest: Manifest) -> None:
        self.points: list[tuple[float, float]] = []
        self.seconds: float | None = None
        batch = manifest.training.batch_size
        self._samples = None if test is None else Samples(test, np.arange(len(test)), manifest.input, batch)
        self._features: dict[bytes, Mapping[str, npt.NDArray[Any]]] = {}

    def __call__(self, engine: Engine, history: History) -> None:
        """Take the accuracy as the model is now."""
        self.seconds = history.seconds
        if self._samples is None:
            return
        found = evaluate(engine, self._samples, None if engine.prefix is None else self._kept(engine))
        self.points.append((history.seconds, found.accuracy or 0.0))

    def _kept(self, engine: Engine) -> Inputs:
        """What a frozen front part gives is computed once."""

        def inputs(samples: Samples, batch: Indices) -> Mapping[str, npt.NDArray[Any]]:
            if (key := batch.tobytes()) not in self._features:
                self._features[key] = engine.inputs(samples.images(batch))
            return self._features[key]

        return inputs


def _measured(bench: Bench, cell: Cell, artifact: Path, row: Row) -> Row:
    manifest = load(artifact)
    test, clean = bench.test(cell.drift), bench.test(CLEAN)
    with tempfile.TemporaryDirectory(prefix="lorac-deploy.") as scratch:
        data, out = Path(scratch) / "local.npz", Path(scratch) / "out"
        _write_data(bench, cell, artifact, manifest, data)
        config = FinetuneConfig(seed=cell.seed, val_fraction=0.0, threads=1, cache=cell.method.cache)
        curve = Curve(read_samples(test, artifact) if bench.config.curve else None, manifest)
        report = finetune(artifact, data, out, config, on_epoch=curve)
        fused = out / FUSED["onnx"]
        return dataclasses.replace(
            row,
            drifted=accuracy(fused, test, artifact),
            clean=accuracy(fused, clean, artifact),
            seconds=report.seconds if curve.seconds is None else curve.seconds,
            step_seconds=report.step_seconds,
            cache_hits=None if report.cache is None else report.cache.hits,
            cache_misses=None if report.cache is None else report.cache.misses,
            curve=tuple(curve.points),
        )


def _write_data(bench: Bench, cell: Cell, artifact: Path, manifest: Manifest, path: Path) -> None:
    """The local data as a device would have them; methods that need no labels get none."""
    data = read_local(bench, cell.drift, cell.seed, cell.size, artifact)
    labels = None if data.labels is None else with_wrong(data.labels, cell.wrong, manifest.output.classes, cell.seed)
    needs_labels = manifest.trainables and manifest.training.loss != "entropy"
    write_local(path, data, labels if needs_labels else None, artifact)
