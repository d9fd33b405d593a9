"""How much memory does fine-tuning take? Peak resident memory of the whole process, as the kernel counts it (VmHWM).

Each figure is the largest of some fresh processes that load the artifact and step a few times; nothing is
subtracted. ``imports`` is the peak right after the imports, before anything is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import step_options as so
from benchmarks.step_cases import Case, cases
from benchmarks.step_competitors import MEMORY, chosen
from benchmarks.step_process import Worker, WorkerError
from lorac_deploy.bench.environment import environment

QUICK = "ours-r,torch-weight"


def measure(plan: so.Plan, *, steps: int, repeats: int) -> dict[str, Any]:
    """Peaks in bytes of fresh processes, or the reason why there are none."""
    found: list[dict[str, int]] = []
    for _ in range(repeats):
        with Worker(*plan) as worker:
            try:
                imported = worker.ask("hello")["imported_bytes"]
                peak = worker.ask("step", count=steps)["peak_bytes"]
            except WorkerError as err:
                return {"refused": str(err)}
        found.append({"imported_bytes": imported, "peak_bytes": peak})
    return {"runs": found, **{part: max(run[part] for run in found) for part in found[0]}}


def run_case(case: Case, args: argparse.Namespace, pythons: dict[str, Path], batch: int) -> list[dict[str, Any]]:
    """One network and batch size: measure all competitors and print their table."""
    found = []
    for name, competitor in args.competitors.items():
        plan = so.plan(case, competitor, pythons, batch=batch, threads=args.threads)
        figures = measure(plan, steps=args.steps, repeats=args.repeats)
        found.append({"model": case.model, "batch": batch, "competitor": name, **figures})
    rows = [[entry["competitor"], args.competitors[entry["competitor"]].what, *_megabytes(entry)] for entry in found]
    title = f"{case.model}, batch {batch}, {args.threads} thread(s): peak resident memory, MB"
    so.show(title, ["competitor", "", "imports", "peak"], rows)
    return found


def _megabytes(entry: dict[str, Any]) -> list[str]:
    if "refused" in entry:
        return ["refused", entry["refused"][:60]]
    return [f"{entry[part] / 1e6:.0f}" for part in ("imported_bytes", "peak_bytes")]


def main(argv: list[str]) -> int:
    """Measure, print, write JSON after every case."""
    p = so.parser("memory", __doc__, competitors=MEMORY, batch="1,8,64", models_default="resnet18,mobilenet_v2")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="steps of each process (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="processes of each kind (default: %(default)s)")
    args = p.parse_args(argv)
    if args.quick:
        args.models, args.batch, args.threads, args.steps, args.repeats = ["resnet20"], [2], 1, 2, 1
        args.competitors = args.competitors if "--competitors" in argv else chosen(QUICK)
    pythons = so.interpreters(p, args)
    result: dict[str, Any] = {"environment": environment(), "quick": args.quick, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args.models, Path(scratch), size=args.size):
            for batch in args.batch:
                result["rows"] += run_case(case, args, pythons, batch)
                so.write(args.out, result)
    print(f"written: {args.out}")
    return 0
