"""Rows of results: what every benchmark of the suite writes, and what the report reads.

A results file is JSON: ``{"command", "started", "seconds", "quick", "environment", "environments", "rows"}``, of which
``environments`` holds, by name, what the worker processes of each Python environment said of themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lorac_runtime.files import atomic_write

Verdict = Literal["same", "different", "too noisy", ""]
Setting = str | int | float
VERDICTS: tuple[Verdict, ...] = ("same", "different", "too noisy", "")
Key = tuple[str | tuple[tuple[str, Setting], ...], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    ``quantity`` says what was measured ("latency", "peak memory", ...), ``figure`` is its typical value (the median,
    for times) in ``unit`` ("s", "bytes", "%", ...), None where there is none, for which ``note`` then gives the reason.
    ``ratio`` compares it with ``reference``, another variant of the same settings. ``settings`` tell rows apart
    (batch, precision, threads, image size, ...), ``details`` hold the rest: minimum, ninetieth, low and high of the
    ratio's interval, structure, samples (seconds of single runs).
    """

    benchmark: str
    model: str
    format: str
    runtime: str
    variant: str
    quantity: str
    figure: float | None
    unit: str
    ratio: float | None = None
    reference: str = ""
    verdict: Verdict = ""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(map(repr, VERDICTS))}")
        if self.figure is None and not self.note:
            raise ValueError(f"{self.key}: a row without a figure needs a note that says why")
        if any(value is not None and not math.isfinite(value) for value in (self.figure, self.ratio)):
            raise ValueError(f"{self.key}: figure {self.figure} and ratio {self.ratio} must be finite")

    @property
    def key(self) -> Key:
        """What a row of another run must share to be the same measurement."""
        names = (self.benchmark, self.model, self.format, self.runtime, self.variant, self.quantity)
        return (*names, tuple(sorted(self.settings.items())))


@dataclasses.dataclass(frozen=True)
class Results:
    """A results file: rows and what they were measured with."""

    command: str
    started: str  # ISO 8601, UTC
    seconds: float
    quick: bool
    environment: Mapping[str, Any]
    environments: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Row]


def save(path: Path, results: Results) -> None:
    """Write a results file beside, then rename it. Raises ValueError if two rows have the same key."""
    check_unique(results.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(dataclasses.asdict(results), indent=1).encode())


def load(path: Path) -> Results:
    """Read a results file. Raises ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content.pop("rows")]
        return Results(**content, rows=rows)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as err:
        raise ValueError(f"{path} is not a results file of `python -m benchmarks`: {err}") from err


def check_unique(rows: Iterable[Row]) -> None:
    """Raise ValueError if two rows have the same key."""
    seen: set[Key] = set()
    for row in rows:
        if row.key in seen:
            raise ValueError(f"two rows say what {row.key} is")
        seen.add(row.key)
