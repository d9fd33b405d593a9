"""What a run was made with: the machine, and the packages of every environment, as terms and texts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report_numbers as rn
from benchmarks.rows import Results, Row

Terms = list[tuple[str, str]]
FIRST = ("processor", "cores", "usable cores", "governor", "load", "memory", "system", "kernel", "machine", "python")
NESTED = ("packages", "runtimes")  # names with versions
NOTHING = "nothing is known of it"
TERMS = {"load": "load (1, 5 and 15 minutes)"}


def machine(environment: Mapping[str, Any]) -> Terms:
    """The machine that ran it, in a fixed order, then whatever else is known."""
    names = [*(name for name in FIRST if name in environment), *(n for n in environment if n not in FIRST)]
    return [(TERMS.get(name, name), text(name, environment[name])) for name in names]


def versions(environments: Mapping[str, Mapping[str, Any]], host: Mapping[str, Any]) -> Terms:
    """Every environment's name, and in one line what its processes said, without what holds for the whole machine."""
    return [(name, "; ".join(_facts(_own(said, host))) or NOTHING) for name, said in environments.items()]


def _own(said: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment says of itself; packages and Python are its own even if equal."""
    own = (*NESTED, "python")
    return {n: v for n, v in said.items() if n in own or (n != "load" and (n not in host or host[n] != v))}


def _facts(own: Mapping[str, Any]) -> list[str]:
    """Packages first."""
    nested = [text(name, own[name]) for name in NESTED if name in own]
    return [*nested, *(_fact(name, value) for name, value in own.items() if name not in NESTED)]


def _fact(name: str, value: Any) -> str:
    """Sentences, such as the reason of a failure, after a colon."""
    sentence = isinstance(value, str) and " " in value
    return f"{name}{':' if sentence else ''} {text(name, value)}"


def text(name: str, value: Any) -> str:
    """One fact.

    >>> text("memory", 25_276_502_016), text("load", [0.5, 0.25, 1]), text("packages", {"numpy": "2.4.6"})
    ('25.3 GB', '0.50, 0.25, 1.00', 'numpy 2.4.6')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(key, inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text(name, inner) for inner in value) or "none"
    if name == "load" and isinstance(value, int | float):
        return f"{value:.2f}"
    if isinstance(value, int) and (name == "memory" or name.endswith("bytes")):
        return rn.with_unit(value, "bytes")
    return value if isinstance(value, str) else json.dumps(value)


def names(rows: Sequence[Row]) -> list[str]:
    """The environments that rows were measured in: named in their details, or after their runtime."""
    own = (str(row.details.get("environment", "")) or row.runtime for row in rows)
    return [name for name in dict.fromkeys(own) if name]


def command(benchmark: str, results: Results) -> str:
    """What makes the rows of one benchmark again: the run's own command where it made no others."""
    if all(row.benchmark == benchmark for row in results.rows):
        return results.command
    return f"python -m benchmarks {shlex.quote(benchmark)}{' --quick' if results.quick else ''}"
