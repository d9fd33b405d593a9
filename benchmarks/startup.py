"""How long from starting the process to the end of its first training step?

Interleaved rounds; each starts a fresh process for every competitor, which imports, loads its files and steps once.
The first round, which fills the disk cache, is not counted. PyTorch loads the whole network from one file, without
torchvision. A process waits for nothing: its request lies on stdin when it starts.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import step_options as so
from benchmarks import step_rounds as sr
from benchmarks.step_cases import cases
from benchmarks.step_competitors import REFERENCE, STARTUP, chosen
from benchmarks.step_process import Worker
from lorac_deploy.bench.environment import environment

QUICK = "ours-r,torch-weight"


def first_step(plan: so.Plan) -> list[float]:
    """Seconds that a fresh process takes to have made a step."""
    with Worker(*plan) as worker:
        worker.ask("step", count=1)
        return [time.perf_counter() - worker.started]


def measure(plans: dict[str, so.Plan], rounds: int) -> dict[str, Any]:
    """Seconds by competitor and round, summaries, and ratios to the reference where it runs too."""
    turns = {name: functools.partial(first_step, plan) for name, plan in plans.items()}
    seconds = {name: found[1:] for name, found in sr.interleaved(turns, rounds + 1).items()}
    reference = seconds.get(REFERENCE)
    summaries = {
        name: {
            **dataclasses.asdict(sr.summary(own)),
            "ratio": dataclasses.asdict(sr.ratio(own, reference)) if reference else None,
        }
        for name, own in seconds.items()
    }
    return {"summary": summaries, "seconds": seconds}


def rows(summaries: dict[str, Any], names: dict[str, str]) -> list[list[str]]:
    """A table's rows: seconds, then the ratio of minima and of medians."""
    table = []
    for name, figures in summaries.items():
        r = figures["ratio"]
        seconds = [f"{figures[part]:.2f}" for part in ("minimum", "median", "ninetieth")]
        table.append([name, names[name], *seconds, f"{r['minima']:.2f} / {r['medians']:.2f}" if r else "-"])
    return table


def main(argv: list[str]) -> int:
    """Measure, print, write JSON after every case."""
    p = so.parser("startup", __doc__, competitors=STARTUP, batch="8", models_default="resnet18,mobilenet_v2")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=10, help="counted ones (default: %(default)s)")
    args = p.parse_args(argv)
    if args.quick:
        args.models, args.batch, args.threads, args.rounds = ["resnet20"], [2], 1, 2
        args.competitors = args.competitors if "--competitors" in argv else chosen(QUICK)
    pythons = so.interpreters(p, args)
    names = {name: competitor.what for name, competitor in args.competitors.items()}
    result: dict[str, Any] = {"environment": environment(), "quick": args.quick, "cases": []}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args.models, Path(scratch), size=args.size):
            for batch in args.batch:
                plans = {
                    n: so.plan(case, c, pythons, batch=batch, threads=args.threads) for n, c in args.competitors.items()
                }
                found = {"model": case.model, "batch": batch, "threads": args.threads, **measure(plans, args.rounds)}
                result["cases"].append(found)
                so.write(args.out, result)
                title = f"{case.model}, batch {batch}, {args.threads} thread(s): seconds to the end of the first step"
                head = ["competitor", "", "min", "median", "90 %", f"x {REFERENCE}"]
                so.show(title, head, rows(found["summary"], names))
    print(f"written: {args.out}")
    return 0
