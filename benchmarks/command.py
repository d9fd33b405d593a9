"""What the commands of the suite share: options, progress, a table of rows, the results file."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import interpreters as envs
from benchmarks.rows import Results, Row, save
from lorac_deploy.bench.environment import environment

Say = Callable[[str], None]
RESULTS = envs.ROOT / "benchmarks" / "results"
WIDTH = 160  # of tables where the output is no terminal
UNITS = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")), "bytes": ((1e6, "MB"), (1e3, "kB"), (1, "bytes"))}


class _Interpreter(argparse.Action):
    """Collects NAME=PATH into a mapping, and says what is wrong with one as a usage error."""

    def __call__(self, p: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None) -> None:
        try:
            setattr(namespace, self.dest, {**getattr(namespace, self.dest), **envs.parsed_interpreters([values])})
        except ValueError as err:
            p.error(str(err))


def common_options(p: argparse.ArgumentParser, name: str) -> None:
    """--python, --quick and --out."""
    run_options(p)
    p.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file (default: %(default)s)")


def run_options(p: argparse.ArgumentParser) -> None:
    """--python and --quick."""
    p.add_argument("--python", action=_Interpreter, default={}, metavar="NAME=PATH", help="another interpreter")
    p.add_argument("--quick", action="store_true", help="the smallest settings: shows that it works, in a minute")


def finish(
    name: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    measure: Callable[[Say], list[Row]],
    *,
    problems: Callable[[Iterable[Row]], list[str]] = lambda _: [],
    quantities: Sequence[str] = (),
) -> int:
    """Measure, print the rows, write the file; exit status 1 if there are ``problems`` with the rows.

    ``quantities`` are those that are printed (default: all); the file has all of them.
    """
    started, clock = now(), time.perf_counter()
    with Console(stderr=True).status(f"{name}: beginning") as status:
        rows = measure(lambda text: status.update(text))
    command = called(name, argv)
    save(args.out, results(command, started, time.perf_counter() - clock, args.quick, rows, args.python))
    show([row for row in rows if not quantities or row.quantity in quantities])
    print(f"written: {args.out}")
    return said(problems(rows))


def said(problems: Sequence[str]) -> int:
    """Print what is wrong; the exit status."""
    for text in problems:
        print(f"WRONG: {text}")
    return 1 if problems else 0


def called(name: str, argv: Sequence[str]) -> str:
    """The command as somebody would type it."""
    return shlex.join(["python", "-m", "benchmarks", name, *argv])


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def results(
    command: str, started: str, seconds: float, quick: bool, rows: Sequence[Row], given: Mapping[str, Path]
) -> Results:
    """A results file's content, with what each environment that has a row says of itself."""
    names = sorted({row.runtime for row in rows} & {*envs.NAMES})
    return Results(command, started, seconds, quick, environment(), envs.described(names, given), rows)


def show(rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table(box=box.SIMPLE)
    for head in ("model", "format", "runtime", "variant", "what", "settings"):
        table.add_column(head)
    for head in ("figure", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict, or why there is none")
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        what = (row.model, row.format, row.runtime, row.variant, row.quantity, settings)
        table.add_row(*what, in_unit(row.figure, row.unit), ratio, row.verdict or row.note)
    console.print(table, markup=False)


def in_unit(figure: float | None, unit: str) -> str:
    """A figure with three digits in a unit of its size.

    >>> in_unit(0.01234, "s"), in_unit(45_600_000, "bytes"), in_unit(None, "s"), in_unit(3, "%")
    ('12.3 ms', '45.6 MB', '', '3 %')
    """
    if figure is None:
        return ""
    scales = UNITS.get(unit, ((1, unit),))
    factor, name = next((s for s in scales if abs(figure) >= s[0]), scales[-1])
    return f"{figure / factor:.3g} {name}"
