"""What does fine-tuning cost, beside what one would use instead: a step, an epoch, the way to a target accuracy?

Parts: ``steps`` (steps and epochs, in interleaved rounds), ``target`` (until so many images are classified rightly) and
``growth`` (ours with rank, batch, depth and image size). Every step stands beside two forward passes, the floor, and
beside the most multiply-adds a second that the machine reaches, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from benchmarks import finetune_peak, finetune_steps, finetune_target
from benchmarks.command import Say, common_options, finish
from benchmarks.finetune_cases import PARTS, Cases, Settings
from benchmarks.finetune_peak import Peak
from benchmarks.rows import Row
from benchmarks.step_process import Workers

__all__ = ["Settings", "main", "rows"]


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure all parts that the settings name."""
    with Workers(settings.python, quick=settings.quick) as workers:
        points = (*settings.points, *settings.sweeps)
        say("peak: multiply-adds of onnxruntime")
        peak, found = finetune_peak.measured(workers, tuple(sorted({point.threads for point in points})))
        with Cases() as cases:
            for part in [part for part in ("steps", "growth") if part in settings.parts]:
                found += _points(settings, workers, cases, peak, part=part, say=say)
    if "target" in settings.parts:  # in fresh processes
        with Workers(settings.python, quick=settings.quick) as workers:
            found += finetune_target.rows(settings, workers, say=say)
    return found


def _points(settings: Settings, workers: Workers, cases: Cases, peak: Peak, *, part: str, say: Say) -> list[Row]:
    found: list[Row] = []
    points, effort = (
        (settings.points, settings.effort) if part == "steps" else (settings.sweeps, settings.growth_effort)
    )
    for point in points:
        case = cases.of(point.model, point.size)
        found += finetune_steps.rows(workers, case, point, effort, peak=peak, say=say)
    return found


def main(argv: Sequence[str]) -> int:
    """Measure, print, write the results file."""
    p = argparse.ArgumentParser(prog="python -m benchmarks finetune", description=__doc__)
    p.add_argument("--only", type=_parts, default=PARTS, help=f"some parts of {','.join(PARTS)} (default: all)")
    common_options(p, "finetune")
    args = p.parse_args(argv)
    settings = Settings(args.only, args.quick, args.python)
    return finish("finetune", argv, args, functools.partial(rows, settings))


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    return names
