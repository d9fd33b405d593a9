"""How long from starting the process to the end of its first training step?

Interleaved rounds; each starts a fresh process for every competitor, which imports, loads its files and steps once.
The first round, which fills the disk cache, is not counted. PyTorch loads the whole network from one file, without
torchvision.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import step_competitors as sc
from benchmarks import step_rounds as sr
from benchmarks.command import Say, common_options, finish
from benchmarks.finetune_cases import Cases, noted, shortened
from benchmarks.rows import Row
from benchmarks.step_cases import Case
from benchmarks.step_competitors import REFERENCE, Competitor
from benchmarks.step_process import WorkerError, fresh
from lorac_runtime.errors import LoracDeployError

BATCH, THREADS, SIZE = 8, 2, 32
EVERY = sc.chosen(REFERENCE, "ours, full", "onnxruntime-training, lora-c", "PyTorch, lora-c", "PyTorch, full")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure; ``python`` holds other interpreters of environments, by name."""

    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: one small network."""
        return cls(quick=True, python=python)

    @property
    def models(self) -> tuple[str, ...]:
        """Networks."""
        return ("resnet20",) if self.quick else ("resnet18", "mobilenet_v2")

    @property
    def rounds(self) -> int:
        """Counted ones."""
        return 2 if self.quick else 10


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure every network."""
    found: list[Row] = []
    with Cases() as cases:
        for model in settings.models:
            say(f"startup: {model}, {settings.rounds} rounds")
            found += _rows(settings, cases.of(model, SIZE))
    return found


def _rows(settings: Settings, case: Case) -> list[Row]:
    notes, refused = dict[str, str](), dict[str, str]()
    for competitor in EVERY:  # the round that is not counted
        try:
            _, notes[competitor.label] = first_step(settings, case, competitor)
        except (WorkerError, FileNotFoundError, RuntimeError, LoracDeployError) as err:
            refused[competitor.label] = str(err)
    turns = {
        c.label: functools.partial(lambda c: [first_step(settings, case, c)[0]], c) for c in EVERY if c.label in notes
    }
    seconds = sr.interleaved(turns, settings.rounds)
    return [_row(case, c, seconds, noted(notes.get(c.label, ""), refused.get(c.label, ""))) for c in EVERY]


def first_step(settings: Settings, case: Case, competitor: Competitor) -> tuple[float, str]:
    """(seconds that a fresh process takes to have made a step, where it ran if that is not its own environment)."""
    job = case.job(competitor, batch=BATCH, threads=THREADS, onnxsim=Path)
    worker, where = fresh(competitor, settings.python, quick=settings.quick)
    with worker:
        worker.ask("open", name="it", job=dataclasses.asdict(job))
        worker.ask("step", name="it", count=1)
        return time.perf_counter() - worker.started, where.note


def _row(case: Case, competitor: Competitor, seconds: Mapping[str, list[list[float]]], note: str) -> Row:
    made = Row(
        benchmark="startup",
        model=case.model,
        format=competitor.format,
        runtime=competitor.environment,
        variant=competitor.label,
        quantity="first step",
        figure=None,
        unit="s",
        settings={"batch": BATCH, "threads": THREADS, "size": SIZE},
        note=shortened(note) or "not measured",
    )
    own, reference = seconds.get(competitor.label), seconds.get(REFERENCE)
    if own is None:
        return made
    summary = sr.summary(own)
    details = {"minimum": summary.minimum, "ninetieth": summary.ninetieth, "samples": [s for turn in own for s in turn]}
    made = dataclasses.replace(made, figure=summary.median, details=details, note=note)
    if reference is None or competitor.label == REFERENCE:
        return made
    return dataclasses.replace(made, ratio=sr.ratio(own, reference).paired, reference=REFERENCE)


def main(argv: Sequence[str]) -> int:
    """Measure, print, write the results file."""
    p = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    common_options(p, "startup")
    args = p.parse_args(argv)
    settings = Settings(args.quick, args.python)
    return finish("startup", argv, args, functools.partial(rows, settings))
