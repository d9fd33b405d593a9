"""The whole suite: every benchmark with its usual settings, one results file, one page.

What there is after each benchmark is written at once, so that a run that is cut off leaves what it has. Where the
folder holds results of an earlier run, the page compares the two.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from benchmarks import latency, report
from benchmarks.command import called, now, results, run_options, said
from benchmarks.rows import Results, Row, load, save

SUITE = ("latency", "finetune", "memory", "export", "footprint")
FILE, EARLIER = "results.json", "previous.json"
LOG_EVERY = 10.0  # seconds between the lines of progress in a log


def measured(name: str, *, quick: bool, python: Mapping[str, Path], say: Callable[[str], None]) -> list[Row]:
    """The rows of one benchmark."""
    module: Any = importlib.import_module(f"benchmarks.{name}")
    make = module.Settings.smallest if quick else module.Settings
    found: list[Row] = module.rows(make(python=python), say)
    return found


class Progress:
    """What is being done: in place on a terminal, elsewhere (a log) a line with the time, at most every ten seconds."""

    def __init__(self, console: Console, status: Status, name: str) -> None:
        self.console, self.status, self.name, self._last = console, status, name, -LOG_EVERY

    def __call__(self, text: str) -> None:
        self.status.update(f"{self.name}: {text}")
        clock = time.monotonic()
        if not self.console.is_terminal and clock - self._last >= LOG_EVERY:
            self._last = clock
            self.console.print(f"{time.strftime('%H:%M:%S')} {self.name}: {text}", soft_wrap=True)


def earlier(folder: Path) -> Results | None:
    """The results that the folder holds, put aside; None where it has none, or another format's."""
    path = folder / FILE
    if not path.is_file():
        return None
    found = load(path)
    path.replace(folder / EARLIER)
    return found


def main(argv: list[str]) -> int:
    """Measure, write as it goes, say what is wrong."""
    p = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    p.add_argument("--report", type=Path, required=True, help="folder for results.json and index.html")
    p.add_argument("--only", nargs="+", choices=SUITE, default=SUITE, help="just these (default: all)")
    run_options(p)
    args = p.parse_args(argv)
    console, started, clock = Console(stderr=True), now(), time.perf_counter()
    args.report.mkdir(parents=True, exist_ok=True)
    try:
        previous = earlier(args.report)
    except ValueError as err:
        p.error(f"--report {args.report}: {err}; move it away, or name another folder")
    found: list[Row] = []
    for name in args.only:
        with console.status(f"{name}: beginning") as status:
            say = Progress(console, status, name)
            found += measured(name, quick=args.quick, python=args.python, say=say)
        seconds = time.perf_counter() - clock
        now_known = results(called("all", argv), started, seconds, args.quick, found, args.python)
        save(args.report / FILE, now_known)
        page = report.write(now_known, args.report, previous)
        console.print(f"{name}: {len(found)} rows so far, {seconds:.0f} s")
    print(f"written: {args.report / FILE}, {page}")
    return said(latency.problems(found))
