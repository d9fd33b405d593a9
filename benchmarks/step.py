"""How long does a fine-tuning step take, beside what one would use instead, in the same interleaved run?

All step the same network on the same batch, from the same numbers (the first losses are compared), with AdamW and
clipping where the competitor has it. Each is a process of its own; in each round every one has a turn of some steps,
of which the first is not counted, while the others wait on a pipe. Not counted: loading, preparing images.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import step_options as so
from benchmarks import step_rounds as sr
from benchmarks.step_cases import Case, cases
from benchmarks.step_competitors import FLOOR, REFERENCE, STEP, chosen
from benchmarks.step_process import SETTLE, Worker, opened
from lorac_deploy.bench.environment import environment

WARMUP = 3  # steps of each competitor before the first round
QUICK = "ours-r,forward-twice,torch-weight"


def turn(worker: Worker, count: int) -> Sequence[float]:
    """Seconds of ``count`` steps, after one that brings the worker's memory back into the caches."""
    time.sleep(SETTLE)
    seconds: list[float] = worker.ask("step", count=count + 1)["seconds"]
    return seconds[1:]


def measure(jobs: dict[str, so.Plan], *, rounds: int, steps: int, reference: str) -> dict[str, Any]:
    """All rounds of one case: seconds, first losses, environments, peak memory, and who refused why."""
    with opened(jobs, warmup=WARMUP) as found:
        workers, losses = found.workers, {name: values[0] for name, values in found.losses.items()}
        load = os.getloadavg()[0]
        seconds = sr.interleaved({n: functools.partial(turn, w, steps) for n, w in workers.items()}, rounds)
        return {
            "refused": found.refused,
            "first_losses": found.losses,
            "disagreeing": sr.disagreeing(losses, reference) if reference in losses else [],
            "load": [load, os.getloadavg()[0]],
            "peak_bytes": {name: worker.ask("step", count=0)["peak_bytes"] for name, worker in workers.items()},
            "environments": {name: worker.ask("hello")["environment"] for name, worker in workers.items()},
            "seconds": seconds,
        }


def summarized(found: dict[str, Any], references: Sequence[str]) -> dict[str, Any]:
    """Summaries by competitor, and ratios to each reference that was measured."""
    seconds: Mapping[str, list[list[float]]] = found["seconds"]
    return {
        name: {
            **dataclasses.asdict(sr.summary(own)),
            "ratios": {r: dataclasses.asdict(sr.ratio(own, seconds[r])) for r in references if r in seconds},
        }
        for name, own in seconds.items()
    }


def rows(found: dict[str, Any], names: dict[str, str], references: Sequence[str]) -> list[list[str]]:
    """A table's rows: milliseconds, then ratios (of minima / of medians) to each reference."""
    table = []
    for name, what in names.items():
        if name in found["refused"]:
            table.append([name, what, "refused"])
            continue
        figures = found["summary"][name]
        row = [name, what + (" (another loss!)" if name in found["disagreeing"] else "")]
        row += [f"{1000 * figures[part]:.2f}" for part in ("minimum", "median", "ninetieth")]
        ratios = [figures["ratios"].get(r) for r in references]
        table.append(row + [f"{r['minima']:.2f} / {r['medians']:.2f}" if r else "-" for r in ratios])
    return table


def run_case(case: Case, args: argparse.Namespace, pythons: dict[str, Path], *, batch: int, threads: int) -> Any:
    """Measure one case and print its table."""
    jobs = {n: so.plan(case, c, pythons, batch=batch, threads=threads) for n, c in args.competitors.items()}
    references = (args.reference, FLOOR)
    found = measure(jobs, rounds=args.rounds, steps=args.steps, reference=args.reference)
    found = {"model": case.model, "batch": batch, "threads": threads, "simplified_nodes": case.simplified, **found}
    found["summary"] = summarized(found, references)
    title = f"{case.model}, batch {batch}, {threads} thread(s), {args.rounds} rounds of {args.steps} steps, ms"
    head = ["competitor", "", "min", "median", "90 %", *(f"x {name}" for name in references)]
    so.show(title, head, rows(found, {n: c.what for n, c in args.competitors.items()}, references))
    for name, reason in found["refused"].items():
        print(f"{name} refused: {reason[:400]}")
    return found


def parsed(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Path]]:
    """Options, and the interpreters that they need."""
    p = so.parser("step", __doc__, competitors=STEP, batch="8,32", models_default="resnet18")
    p.add_argument("--threads", type=so.counts, default=[1, 2], help="numbers of threads (default: 1,2)")
    p.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    p.add_argument("--steps", type=int, default=3, help="counted steps in a turn (default: %(default)s)")
    p.add_argument("--reference", default=REFERENCE, help="competitor that ratios refer to (default: %(default)s)")
    args = p.parse_args(argv)
    if args.quick:
        args.models, args.batch, args.threads, args.rounds, args.steps = ["resnet20"], [2], [1], 2, 2
        args.competitors = args.competitors if "--competitors" in argv else chosen(QUICK)
    if args.rounds < 1 or args.steps < 1:
        p.error("--rounds and --steps count from 1")
    return args, so.interpreters(p, args)


def main(argv: list[str]) -> int:
    """Measure, print, write JSON after every case."""
    args, pythons = parsed(argv)
    result: dict[str, Any] = {"environment": environment(), "quick": args.quick, "cases": []}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args.models, Path(scratch), size=args.size):
            for threads in args.threads:
                for batch in args.batch:
                    result["cases"].append(run_case(case, args, pythons, batch=batch, threads=threads))
                    so.write(args.out, result)
    print(f"written: {args.out}")
    return 1 if any(case["disagreeing"] for case in result["cases"]) else 0
