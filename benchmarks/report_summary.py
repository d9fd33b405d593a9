"""The report's head in words: what came out, and whether the run's own controls allow to believe it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.latency_pooled import POOLED
from benchmarks.rows import Row

State = Literal["holds", "fails", "open"]
ALARMS = 5  # rows that a warning names for each control


@dataclasses.dataclass(frozen=True)
class Statement:
    """One thing that the run says: ``text`` in a sentence, ``rows`` that stand against it."""

    subject: str
    state: State
    text: str
    rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statements, and reasons not to trust the run's timings."""

    warnings: tuple[str, ...]
    statements: tuple[Statement, ...]


def summary(rows: Sequence[Row]) -> Summary:
    """What the rows say of fused files, controls and planted faults; nothing where no latency was measured."""
    if not any(row.benchmark == "latency" for row in rows) and not any(map(rw.must, rows)):
        return Summary((), ())
    found = (fused(rows), structure(rows), controls(rows), faults(rows))
    alarms = [line for s in found[2:] if s.state == "fails" for line in (s.text, *_first(s.rows))]
    return Summary(tuple(alarms), found)


def _first(lines: Sequence[str]) -> list[str]:
    """The first few lines; all of them stand beside the statement."""
    left = len(lines) - ALARMS
    return [*lines[:ALARMS], *([f"and {left} more"] if left > 0 else [])]


def fused(rows: Sequence[Row]) -> Statement:
    """How many fused files are as fast as their base."""
    own = [row for row in rows if rw.is_fused(row)]
    counts = Counter(row.verdict for row in own)
    state: State = "fails" if counts["different"] else "holds" if own and counts["same"] == len(own) else "open"
    words = [f"{counts['same']} same", f"{counts['too noisy']} too noisy", f"{counts['different']} different"]
    words += [f"{counts['']} without a verdict"] if counts[""] else []
    text = f"{_rows(len(own))} of fused against base: {', '.join(words)}." if own else "No fused file was timed."
    text += _together(rows)
    return Statement("Fused against base", state, text, _lines(row for row in own if row.verdict == "different"))


def _together(rows: Sequence[Row]) -> str:
    """The mean over all rows, the last of its kind being that over all formats."""
    own = [row for row in rows if row.quantity == POOLED and row.ratio is not None]
    if not own:
        return ""
    low, high = own[-1].details["low"], own[-1].details["high"]
    between = f"{rn.ratio(own[-1].ratio)} ({rn.ratio(low)} to {rn.ratio(high)})"
    return f" All together: {between} times the base's latency, {own[-1].verdict}."


def structure(rows: Sequence[Row]) -> Statement:
    """How many fused files the drop-in check passed."""
    own = [row for row in rows if rw.is_fused(row)]
    passed = [row for row in own if rw.structure(row) == rw.DROP_IN]
    refused = [row for row in own if rw.structure(row) == rw.NO_DROP_IN]
    state: State = "fails" if refused else "holds" if own and len(passed) == len(own) else "open"
    text = f"{len(passed)} of {_rows(len(own))} of fused files passed the drop-in check before anything was timed."
    return Statement("Structure", state, text if own else "No fused file was checked.", _lines(refused))


def controls(rows: Sequence[Row]) -> Statement:
    """Whether what must be slower came out slower."""
    every = [row for row in rows if rw.is_control(row)]
    own = [row for row in every if row.figure is not None]
    failed = [row for row in own if not rw.slower(row)]
    absent = f" {len(every) - len(own)} could not be measured." if len(every) > len(own) else ""
    if not own:
        text = "No negative control was measured: nothing shows that this run can tell a slower file from an equal one."
        return Statement("Negative controls", "open", text + absent)
    text = f"All {len(own)} negative controls came out slower, as they must."
    if failed:
        text = f"{len(failed)} of {len(own)} negative controls did not come out slower, as they must."
    return Statement("Negative controls", "fails" if failed else "holds", text + absent, _lines(failed))


def faults(rows: Sequence[Row]) -> Statement:
    """Whether planted faults were caught, by structure and by timing."""
    every = [row for row in rows if rw.is_fault(row) and row.quantity == "latency"]
    own = [row for row in every if row.figure is not None]
    if not own:
        return Statement("Planted faults", "open", "No file with a planted fault was measured.")
    seen = [row for row in own if rw.structure(row) == rw.NO_DROP_IN]
    timed = [row for row in own if rw.slower(row) or rw.must(row) != "different"]
    missed = [row for row in own if row not in seen or row not in timed]
    caught = sum(rw.slower(row) for row in own)
    text = f"Of {len(own)} planted faults {len(seen)} were caught by the structure check and {caught} by timing."
    return Statement("Planted faults", "fails" if missed else "holds", text, _lines(missed))


def _lines(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(_line(row) for row in rows)


def _line(row: Row) -> str:
    ratio = f", {rn.ratio(row.ratio)} times {row.reference or 'the reference'}" if row.ratio is not None else ""
    check = f", {rw.structure(row)}" if row.details.get("structure") else ""
    return f"{rw.label(row)}: {row.verdict or 'no verdict'}{ratio}{check}"


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")
