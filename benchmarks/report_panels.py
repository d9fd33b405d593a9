"""What plots of the report are made of: groups of panels as wide as a phone, with one legend in the page's own text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from markupsafe import Markup

from benchmarks import report_words as rw
from benchmarks.report_svg import SERIES, series
from benchmarks.rows import Row

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
SHAPES = {  # matplotlib's name of a marker, and its outline in a box of 24 x 12
    "o": "M12 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "s": "M8.3 2.3h7.4v7.4h-7.4z",
    "^": "M12 1.3l4.6 9h-9.2z",
    "D": "M12 .8l5.2 5.2l-5.2 5.2l-5.2-5.2z",
    "v": "M12 10.7l4.6-9h-9.2z",
    "P": "M10.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
}
AREA, LINE = "M2 1.5h20v9h-20z", "M1 5h22v2h-22z"
LONG = 34  # characters of a label within a plot


@dataclasses.dataclass(frozen=True)
class Mark:
    """How one thing is drawn: matplotlib's marker, the colour's name, the outline that the legend shows."""

    label: str
    marker: str
    colour: str
    outline: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One drawing, and what stands above it."""

    caption: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Group:
    """Panels that are read together; without any, ``missing`` says why."""

    title: str
    text: str
    panels: tuple[Panel, ...] = ()
    legend: tuple[Mark, ...] = ()
    missing: str = ""


def marks(labels: Iterable[str]) -> dict[str, Mark]:
    """A mark for each label; no two alike below 24."""
    shapes = list(SHAPES)
    return {
        label: Mark(label, shapes[k % len(shapes)], series(k), SHAPES[shapes[k % len(shapes)]])
        for k, label in enumerate(dict.fromkeys(labels))
    }


def method_marks(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, Mark]:
    """A mark for each method on each engine: the method's colour, the engine's shape; any if either is alone."""
    engines, methods = (list(dict.fromkeys(found)) for found in zip(*map(_engine, rows), strict=True))
    if min(len(methods), len(engines)) == 1 or len(engines) > len(SHAPES) or len(methods) > SERIES:
        return marks(map(name, rows))
    places = {name(row): _engine(row) for row in rows}
    shapes = list(SHAPES)
    return {
        label: mark(label, shapes[engines.index(engine)], series(methods.index(method)))
        for label, (engine, method) in places.items()
    }


def _engine(row: Row) -> tuple[str, str]:
    """(engine, method): a variant may name both, as in "PyTorch, lora-c"."""
    engine, comma, method = row.variant.partition(", ")
    return (engine, method) if comma else (row.runtime, row.variant)


def mark(label: str, marker: str, colour: str) -> Mark:
    """A mark of a chosen shape and colour."""
    return Mark(label, marker, colour, SHAPES[marker])


def grouped(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Things by their key, in order of appearance."""
    found: dict[K, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def shortened(text: str) -> str:
    """A label that fits into a plot."""
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def more(shown: int, all_of_them: int) -> str:
    """A sentence on panels that are not shown; empty where none is left out."""
    return f" {all_of_them - shown} more are in the table only." if all_of_them > shown else ""


def namer(rows: Iterable[Row]) -> Callable[[Row], str]:
    """Names for methods on engines that tell those of ``rows`` apart."""
    every = {_method(row): row for row in rows}
    names = dict(zip(every, rw.distinguishing([*every.values()], ("variant", "runtime")), strict=True))
    return lambda row: names[_method(row)]


def _method(row: Row) -> tuple[str, str]:
    return row.variant, row.runtime
