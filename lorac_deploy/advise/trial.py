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
from lorac_runtime.session import finetune

CACHE = 1 << 30  # bytes of disk that a trial may take for the features of a frozen front part


@dataclasses.dataclass(frozen=True)
class Trial:
    """How trials are made: share of the data held out, epochs, on how many splits a candidate has been tried after each
    round, threads (None: the engine's own choice)."""

    held_out: float = 0.3
    epochs: int = 5
    splits: tuple[int, ...] = (1, 3)
    seed: int = 0
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """What trials of one candidate gave: accuracy before and after for each split, on its held-out samples.

    ``step_seconds`` are the medians of a training step. ``failed`` says why there is no accuracy.
    """

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    failed: str | None = None

    @property
    def accuracy(self) -> float:
        """Mean over splits; -1 where the trial failed."""
        return statistics.fmean(self.after) if self.after and self.failed is None else -1.0

    @property
    def gain(self) -> float:
        """Mean rise of the accuracy."""
        return self.accuracy - statistics.fmean(self.before) if self.accuracy >= 0 else 0.0


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
        for before, splits in _rounds(trial):
            for index in alive:
                for split in range(before, splits):
                    scores[index] = _tried(scores[index], artifacts[index], path, trial, split)
                done += splits - before
                on_progress(done, total)
            alive = better_half(alive, [score.accuracy for score in scores])
    return scores


def better_half(alive: Sequence[int], accuracies: Sequence[float]) -> list[int]:
    """Those of ``alive`` with the better accuracies, one more where their number is odd.

    >>> better_half([0, 1, 2], [0.5, 0.7, 0.9])
    [2, 1]
    """
    return sorted(alive, key=lambda i: -accuracies[i])[: (len(alive) + 1) // 2]


def _rounds(trial: Trial) -> list[tuple[int, int]]:
    """(splits before, splits after) of each round."""
    return list(zip((0, *trial.splits), trial.splits, strict=False))


def _runs(candidates: int, trial: Trial) -> int:
    count = 0
    for before, splits in _rounds(trial):
        count += candidates * (splits - before)
        candidates = (candidates + 1) // 2
    return count


def _tried(score: Score, artifact: Path, data: Path, trial: Trial, split: int) -> Score:
    """The score with one more split."""
    if score.failed is not None:
        return score
    with tempfile.TemporaryDirectory() as out:
        config = FinetuneConfig(
            epochs=trial.epochs,
            val_fraction=trial.held_out,
            seed=trial.seed + split,
            threads=trial.threads,
            cache=CACHE if load(artifact).features else None,
        )
        try:
            with quiet_runtime():
                report = finetune(artifact, data, Path(out) / "out", config)
        except DivergenceError as err:
            return dataclasses.replace(score, failed=str(err))
    return Score(
        before=(*score.before, report.accuracy_before or 0.0),
        after=(*score.after, report.accuracy_after or 0.0),
        step_seconds=(*score.step_seconds, report.step_seconds),
    )


def _write(path: Path, data: LocalData, manifest: Manifest) -> None:
    arrays = {manifest.input.key: data.images, "labels": data.labels}
    np.savez(path, **arrays)  # type: ignore[arg-type]
