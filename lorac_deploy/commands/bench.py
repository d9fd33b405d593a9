"""`lorac-deploy bench latency BASE FUSED`: is the fused file as fast as its base, on this machine?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._tables import standard_output
from lorac_runtime.errors import EngineError

if TYPE_CHECKING:
    from lorac_deploy.bench.latency import LatencyReport, Line

PROCESSES = 16  # at most
TOO_NOISY = 3
STATUS = {"same": 0, "different": 1, "too noisy": TOO_NOISY}
COLOURS = {"same": "green", "different": "bold red", "too noisy": "yellow", "": ""}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy bench",
        description="Measure whether FUSED is as fast as BASE: first the proof by structure, then runs of both in "
        "turns in fresh processes, and an equivalence test at 1 %. Controls that must come out slower show that the "
        "measurement can tell. Exit status 0 if nothing differs, 1 if a fused file is no drop-in or not as fast, "
        f"{TOO_NOISY} if the machine is too noisy to tell.",
    )
    p.add_argument("what", choices=("latency",), help="what is measured")
    p.add_argument("base", type=Path, help="an artifact's folder, or one base file (.onnx or .tflite)")
    p.add_argument("fused", type=Path, help="a folder with fused.onnx or fused.tflite, or one fused file")
    p.add_argument("--batch", type=int, default=1, help="samples in a run (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="threads of the runtime (default: %(default)s)")
    p.add_argument(
        "--python",
        type=Path,
        action="append",
        metavar="PATH",
        help="interpreter of another environment whose runtimes are measured; may be repeated (default: this one)",
    )
    p.add_argument(
        "--processes",
        type=int,
        default=PROCESSES,
        help="fresh processes for each runtime, at most; more can tell on a noisier machine (default: %(default)s)",
    )
    p.add_argument("--no-controls", action="store_true", help="base and fused alone: takes less time and shows less")
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.processes < 3:
        p.error(f"--processes: at least 3 are needed to tell anything, got {args.processes}")
    report = _measured(p, args)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report)
    return STATUS[report.outcome]


def _measured(p: argparse.ArgumentParser, args: argparse.Namespace) -> LatencyReport:
    _require_scipy()
    from lorac_deploy.bench.contest import Effort
    from lorac_deploy.bench.latency import Settings, latency

    with usage_errors(p):
        effort = Effort.up_to(args.processes)
        settings = Settings(args.batch, args.threads, not args.no_controls, effort)
    interpreters = args.python or [Path(sys.executable)]
    with Console(stderr=True).status("comparing the structure") as status:
        return latency(args.base, args.fused, interpreters, settings, say=status.update)


def _require_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError as err:
        raise EngineError("measuring needs scipy for its statistics: pip install 'lorac-deploy[bench]'") from err


def _show(report: LatencyReport) -> None:
    console = standard_output()
    for structure in report.structures:
        passed = sum(check.verdict == "pass" for check in structure.checks)
        verdict = f"[green]a drop-in[/], {passed} checks passed" if structure.ok else "[bold red]NOT a drop-in[/]"
        console.print(f"structure: {structure.fused} is {verdict}", highlight=False)
    table = Table(box=box.SIMPLE, title="latency in ms; the ratio is that of least times, process by process")
    for head in ("runtime", "file"):
        table.add_column(head)
    for head in ("least", "median", "90 %", "load", "first run", "ratio", "interval"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict")
    for line in report.lines:
        table.add_row(*_row(line))
    console.print(table)
    for text in report.words:
        console.print(text, soft_wrap=True, highlight=False, markup=False)


def _row(line: Line) -> list[str]:
    timing, test = line.timing, line.against
    seconds = (timing.minimum, timing.median, timing.ninetieth, timing.load, timing.first)
    judged = ["", "", ""]
    if test is not None:
        colour = COLOURS[test.verdict]
        judged = [f"{test.ratio:.4f}", f"{test.low:.4f} to {test.high:.4f}", f"[{colour}]{test.verdict}[/]"]
    return [line.runtime, f"{line.variant} ({line.format})", *(f"{1e3 * s:.3g}" for s in seconds), *judged]
