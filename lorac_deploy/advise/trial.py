"""Short trials of candidates on a split of the local data, in rounds: each round keeps the better half."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorac_deploy.advise import TRIAL_STEPS
from lorac_deploy.quiet import quiet_runtime
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import LocalData
from lorac_runtime.errors import DivergenceError
from lorac_runtime.manifest import Manifest, TrainingDefaults, load
from lorac_runtime.session import finetune

MOST_SPLITS = 6
CACHE = 1 << 30  # bytes of disk that a trial may take for the features of a frozen front part


@dataclasses.dataclass(frozen=True)
class Trial:
    """How trials are made: share of the data held out, threads (None: the engine's own choice).

    A trial makes as many steps as the run that it stands for, on all data, would make, but no more than ``steps``.
    ``evidence``: on how many held-out samples, over all splits, a candidate has been judged after each round. Few data
    are split more often, up to `MOST_SPLITS` times, so that a trial costs much the same for few as for many.
    """

    held_out: float = 0.3
    steps: int = TRIAL_STEPS
    evidence: tuple[int, ...] = (300, 900)
    seed: int = 0
    threads: int | None = None

    def epochs(self, samples: int, training: TrainingDefaults) -> int:
        """Passes over the part of the data that is not held out.

        >>> Trial().epochs(1000, TrainingDefaults(epochs=10)), Trial().epochs(100, TrainingDefaults(epochs=10))
        (7, 13)
        """
        kept = samples - round(self.held_out * samples)
        whole, part = (-(-count // training.batch_size) for count in (samples, kept))
        return max(1, round(min(self.steps, training.epochs * whole) / part))

    def rounds(self, samples: int) -> list[tuple[int, int]]:
        """(splits before, splits after) of each round.

        >>> Trial().rounds(1000), Trial().rounds(400), Trial().rounds(60)
        ([(0, 1), (1, 3)], [(0, 3), (3, 6)], [(0, 6)])
        """
        held_out = max(1, round(self.held_out * samples))
        splits = [min(MOST_SPLITS, -(-wanted // held_out)) for wanted in self.evidence]
        return [pair for pair in zip((0, *splits), splits, strict=False) if pair[0] < pair[1]]


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
    rounds, epochs = trial.rounds(len(data)), trial.epochs(len(data), load(artifacts[0]).training)
    total, done = _runs(len(artifacts), rounds), 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "local.npz"
        _write(path, data, load(artifacts[0]))
        for before, splits in rounds:
            for index in alive:
                for split in range(before, splits):
                    scores[index] = _tried(scores[index], artifacts[index], path, trial, epochs=epochs, split=split)
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


def _runs(candidates: int, rounds: list[tuple[int, int]]) -> int:
    count = 0
    for before, splits in rounds:
        count += candidates * (splits - before)
        candidates = (candidates + 1) // 2
    return count


def _tried(score: Score, artifact: Path, data: Path, trial: Trial, *, epochs: int, split: int) -> Score:
    """The score with one more split."""
    if score.failed is not None:
        return score
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
