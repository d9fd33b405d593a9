"""Options and output that the measurements of training steps share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.interpreters import ONNXSIM, ROOT, parsed_interpreters, python
from benchmarks.step_cases import Case
from benchmarks.step_competitors import SIMPLIFIED, Competitor, chosen
from benchmarks.step_protocol import Job
from lorac_deploy.models import MODELS

RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 120  # of tables where the output is no terminal
Plan = tuple[Path, str, Job]  # arguments of a Worker


def counts(text: str) -> list[int]:
    """Positive whole numbers, comma-separated.

    >>> counts("8,32")
    [8, 32]
    """
    numbers = [int(part) for part in text.split(",")]
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected numbers from 1 on")
    return numbers


def models(text: str) -> list[str]:
    """Names of models, comma-separated."""
    names = text.split(",")
    known = [name for name, architecture in MODELS.items() if architecture.axes == 3]  # of images
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no model {', '.join(unknown)}: choose from {', '.join(known)}")
    return names


def checked(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``parse`` whose ValueErrors reach the user as they are."""

    def call(value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return call


def parser(name: str, doc: str | None, *, competitors: str, batch: str, models_default: str) -> argparse.ArgumentParser:
    """The options that all of them have."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=doc)
    p.add_argument("--models", type=models, default=models(models_default), help=f"default: {models_default}")
    p.add_argument("--batch", type=counts, default=counts(batch), help=f"batch sizes (default: {batch})")
    p.add_argument("--size", type=int, default=32, help="height and width of images (default: %(default)s)")
    p.add_argument("--competitors", type=checked(chosen), default=chosen(competitors), help=f"default: {competitors}")
    p.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="another interpreter")
    p.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="smallest settings: shows that it works, measures nothing")
    return p


def interpreters(p: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Path]:
    """An interpreter for each environment that the chosen competitors need; ends with a usage message if one lacks."""
    needed = {c.environment for c in args.competitors.values()}
    needed |= {ONNXSIM} if any(c.variant == SIMPLIFIED for c in args.competitors.values()) else set()
    try:
        given = parsed_interpreters(args.python)
        return {name: python(name, given) for name in sorted(needed)}
    except (ValueError, FileNotFoundError) as err:
        p.error(str(err))


def plan(case: Case, competitor: Competitor, pythons: dict[str, Path], *, batch: int, threads: int) -> Plan:
    """What starts the worker of a competitor."""
    artifact = case.artifact(competitor.variant, onnxsim=pythons.get(ONNXSIM))
    job = Job(str(artifact), str(case.batch(batch)), threads, competitor.options)
    return pythons[competitor.environment], competitor.worker, job


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its first two columns hold a name and what that is, the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, text in enumerate(head):
        table.add_column(text, justify="left" if index < 2 else "right", no_wrap=index != 1)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
