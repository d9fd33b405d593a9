"""Tables of the report: rows of results become cells that sort, with everything else in each line's details."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.rows import Row

Tone = Literal["", "good", "bad", "unsure", "plain"]
LONG = 90  # characters of a reason that fit into a cell
IDENTITY = ("variant", "model", "format", "runtime")
ALWAYS = "variant"
OPEN = 6  # lines; a longer table is folded unless it is the first of its section
IN_UNIT = ("minimum", "ninetieth", "maximum")
IN_CELLS = ("must", "low", "high", "samples", "structure", *IN_UNIT)


@dataclasses.dataclass(frozen=True)
class Cell:
    """``value`` sorts a numeric column, ``remark`` stands small beside the text."""

    text: str
    value: float | None = None
    tone: Tone = ""
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a column; a numeric one is sorted as numbers."""

    title: str
    numeric: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A head, and what stands below it for a row; one that is not ``kept`` is left out where it never varies."""

    title: str
    cell: Callable[[Row], Cell]
    numeric: bool = False
    kept: bool = True

    @property
    def head(self) -> Head:
        """What stands above it."""
        return Head(self.title, self.numeric)


@dataclasses.dataclass(frozen=True)
class Line:
    """Cells, and details as terms and texts."""

    cells: tuple[Cell, ...]
    details: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """``common`` says what all lines share."""

    title: str
    common: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    open: bool = True


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for every quantity of one benchmark."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        swept = f", growth with {row.settings['sweep']}" if row.settings.get("sweep") else ""
        groups.setdefault(f"{rw.heading(row.quantity)}{swept}\0{row.unit}", []).append(row)
    return [
        table(own, name.partition("\0")[0], opened=number == 0 or len(own) <= OPEN)
        for number, (name, own) in enumerate(groups.items())
    ]


def table(rows: Sequence[Row], title: str, *, opened: bool = True) -> Table:
    """The table of rows of one quantity and unit."""
    variant, *others = _identity(rows)
    every = [variant, *_verdicts(rows), *others, *_figures(rows)]  # a phone shows what comes first
    columns = [column for column in every if column.kept or _tells(column, rows)]
    fixed = [(c.title, c.cell(rows[0]).text) for c in every if c not in columns and not _varies(c, rows)]
    common = ", ".join(f"{name.lower()} {text}" for name, text in fixed if text)
    lines = tuple(Line(tuple(c.cell(row) for c in columns), details(row)) for row in rows)
    return Table(title, common, tuple(c.head for c in columns), lines, opened)


def _tells(column: Column, rows: Sequence[Row]) -> bool:
    """Whether a column tells rows apart, other than by repeating the variant."""
    return _varies(column, rows) and any(column.cell(row).text != row.variant for row in rows)


def _varies(column: Column, rows: Sequence[Row]) -> bool:
    return len({column.cell(row).text for row in rows}) > 1


def _identity(rows: Sequence[Row]) -> list[Column]:
    """Columns that say which row it is."""
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    fields = [Column(rw.heading(f), _field(f), kept=f == ALWAYS) for f in IDENTITY]
    return fields + [Column(rw.heading(n), _setting(n), numeric=_numeric(n, rows), kept=False) for n in names]


def _field(name: str) -> Callable[[Row], Cell]:
    if name != ALWAYS:
        return lambda row: Cell(getattr(row, name))
    return lambda row: Cell(row.variant or row.quantity, remark=_reason(row))


def _reason(row: Row) -> str:
    """Why there is no figure; the details have all of it."""
    note = row.note if row.figure is None else ""
    return note if len(note) <= LONG else f"{note[:LONG]}…"


def _setting(name: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = row.settings.get(name)
        text = "" if value is None else str(value)
        return Cell(text, value if isinstance(value, int | float) else None)

    return cell


def _numeric(name: str, rows: Sequence[Row]) -> bool:
    return all(isinstance(row.settings.get(name), int | float | None) for row in rows)


def _verdicts(rows: Sequence[Row]) -> list[Column]:
    return [Column("Verdict", verdict)] if any(row.verdict for row in rows) else []


def _figures(rows: Sequence[Row]) -> list[Column]:
    """Columns of numbers and of the structure check; those that no row has anything for are left out."""
    unit = rows[0].unit
    scale = rn.scale_for([row.figure for row in rows], unit)
    minima = [rn.finite(row.details, "minimum") for row in rows]
    timed = unit == "s" and any(value is not None for value in minima)
    title = "Median" if timed else rw.heading(rows[0].quantity)
    columns = [_number(title, scale, lambda row: row.figure)]
    if timed:
        columns.append(_number("Minimum", scale, lambda row: rn.finite(row.details, "minimum"), missing=""))
    if any(row.ratio is not None for row in rows):
        columns.append(Column("Ratio", _ratio, numeric=True))
    if any(row.details.get("structure") for row in rows):
        columns.append(Column("Structure", _structure))
    return columns


def _number(title: str, scale: rn.Scale, value: Callable[[Row], float | None], *, missing: str = rn.NONE) -> Column:
    def cell(row: Row) -> Cell:
        own = value(row)
        return Cell(missing if own is None else rn.scaled(own, scale), own)

    return Column(f"{title}, {scale.unit}" if scale.unit else title, cell, numeric=True)


def _ratio(row: Row) -> Cell:
    return Cell("" if row.ratio is None else rn.ratio(row.ratio), row.ratio)


def verdict(row: Row) -> Cell:
    """The verdict in words, and whether it is the one that the row must have."""
    must = rw.must(row)
    if row.verdict == "":
        return Cell("")
    if row.verdict == "too noisy":
        return Cell(row.verdict, tone="unsure", remark=f"must be {must}" if must == "different" else "")
    if must == "":
        return Cell(row.verdict, tone="plain")
    if row.verdict == must == "different":
        return Cell(row.verdict, tone="good") if rw.slower(row) else _faster(row)
    good = row.verdict == must
    return Cell(row.verdict, tone="good" if good else "bad", remark="" if good else f"must be {must}")


def _faster(row: Row) -> Cell:
    return Cell(row.verdict, tone="bad", remark="must be slower, is faster")


def _structure(row: Row) -> Cell:
    word = rw.structure(row)
    bad = (word == rw.NO_DROP_IN and row.variant == "fused") or (word == rw.DROP_IN and rw.is_fault(row))
    return Cell(word, tone="bad" if bad else "")


def details(row: Row) -> tuple[tuple[str, str], ...]:
    """Everything else that is known of a row."""
    own = row.details
    found = [(rw.heading(name), _in_unit(own, name, row.unit)) for name in IN_UNIT if name in own]
    found += [("Interval of the ratio", interval(row)), ("Ratio to", row.reference if row.ratio is not None else "")]
    found += [("Structure check", _text(own.get("structure", ""))), ("Must come out", rw.must(row))]
    found += [(rw.heading(str(name)), _text(value)) for name, value in own.items() if name not in IN_CELLS]
    found += [("Single runs kept", str(len(rn.samples(own))) if rn.samples(own) else "")]
    found += [("Settings", rw.settings(row)), ("Note", row.note)]
    return tuple((term, text) for term, text in found if text)


def interval(row: Row) -> str:
    """The ratio's interval in words; empty where there is none."""
    low, high = rn.finite(row.details, "low"), rn.finite(row.details, "high")
    return "" if low is None or high is None else f"{rn.ratio(low)} to {rn.ratio(high)}"


def _in_unit(own: Mapping[str, Any], name: str, unit: str) -> str:
    value = rn.finite(own, name)
    return _text(own[name]) if value is None else rn.with_unit(value, unit)


def _text(value: Any) -> str:
    """Whatever a benchmark put into a row's details."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(own)}" for name, own in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rn.significant(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value)
