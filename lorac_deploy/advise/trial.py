"""Short trials of candidates on a split of the local data, in rounds: each round keeps the better half."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorac_deploy.quiet import quiet_runtime
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import LocalData
from lorac_runtime.errors import DivergenceError
from lorac_runtime.manifest import Manifest, load
from lorac_runtime.report import FinetuneReport
from lorac_runtime.session import finetune

CACHE = 1 << 30  # bytes of disk that a trial may take for the features of a frozen front part


@dataclasses.dataclass(frozen=True)
class Trial:
    """How trials are made: share of the data held out, epochs and number of splits of each round, threads (None: the
    engine's own choice)."""

    held_out: float = 0.3
    rounds: tuple[tuple[int, int], ...] = ((2, 1), (5, 2))
    seed: int = 0
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """What trials of one candidate gave: accuracy before and after for each split, on its held-out samples.

    ``step_seconds`` is the median of a training step, ``epochs`` those of the longest trial. ``failed`` says why there
    is no accuracy.
    """

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    epochs: int = 0
    step_seconds: float = 0.0
    failed: str | None = None

    @property
    def accuracy(self) -> float:
        """Mean over splits; -1 where the trial failed."""
        return statistics.fmean(self.after) if self.after else -1.0

    @property
    def gain(self) -> float:
        """Mean rise of the accuracy."""
        return self.accuracy - statistics.fmean(self.before) if self.after else 0.0


def run_trials(
    artifacts: Sequence[Path], data: LocalData, trial: Trial, *, on_progress: Callable[[int, int], None]
) -> list[Score]:
    """The scores of candidates, in their order. All take part in the first round, the better half in each later one.

    ``on_progress`` is called with the number of runs done, and of all.
    """
    scores = [Score() for _ in artifacts]
    alive = list(range(len(artifacts)))
    total, done = _runs(len(artifacts), trial), 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "local.npz"
        _write(path, data, load(artifacts[0]))
        for epochs, splits in trial.rounds:
            for index in alive:
                scores[index] = _scored(artifacts[index], path, trial, epochs, splits)
                done += splits
                on_progress(done, total)
            alive = sorted(alive, key=lambda i: -scores[i].accuracy)[: max(1, (len(alive) + 1) // 2)]
    return scores


def _runs(candidates: int, trial: Trial) -> int:
    count = 0
    for _, splits in trial.rounds:
        count += candidates * splits
        candidates = max(1, (candidates + 1) // 2)
    return count


def _scored(artifact: Path, data: Path, trial: Trial, epochs: int, splits: int) -> Score:
    reports: list[FinetuneReport] = []
    for split in range(splits):
        with tempfile.TemporaryDirectory() as out:
            config = FinetuneConfig(
                epochs=epochs,
                val_fraction=trial.held_out,
                seed=trial.seed + split,
                threads=trial.threads,
                cache=CACHE if load(artifact).features else None,
            )
            try:
                with quiet_runtime():
                    reports.append(finetune(artifact, data, Path(out) / "out", config))
            except DivergenceError as err:
                return Score(epochs=epochs, failed=str(err))
    before = [r.accuracy_before for r in reports if r.accuracy_before is not None]
    after = [r.accuracy_after for r in reports if r.accuracy_after is not None]
    return Score(tuple(before), tuple(after), epochs, statistics.median(r.step_seconds for r in reports))


def _write(path: Path, data: LocalData, manifest: Manifest) -> None:
    arrays = {manifest.input.key: data.images, "labels": data.labels}
    np.savez(path, **arrays)  # type: ignore[arg-type]
