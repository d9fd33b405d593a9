"""A run beside the one before: what flipped, what changed, what came and went."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.report_tables import Cell, Head, Line, Table, Tone
from benchmarks.rows import Results, Row

MARGIN = 0.03  # two runs of the suite on one machine should agree on ratios within this
SURE = {"same", "different"}
PASSING = ("load",)  # what an environment says that is another thing every minute
HEADS = (
    *(Head(title) for title in ("Row", "Benchmark", "Quantity", "Verdict")),
    *(Head(t, numeric=True) for t in ("Ratio before", "Ratio now", "Change of ratio", "Change of figure")),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One row now and before."""

    row: Row
    before: Row

    @property
    def ratio(self) -> float | None:
        """Relative change of the ratio."""
        return _relative(self.row.ratio, self.before.ratio)

    @property
    def figure(self) -> float | None:
        """Relative change of the figure; None where the units differ."""
        return _relative(self.row.figure, self.before.figure) if self.row.unit == self.before.unit else None

    @property
    def flipped(self) -> bool:
        """From "same" to "different" or back."""
        return {self.row.verdict, self.before.verdict} == SURE

    @property
    def verdicts(self) -> str:
        """What the verdict was and is."""
        was, now = self.before.verdict or "none", self.row.verdict or "none"
        return now if was == now else f"{was} → {now}"

    @property
    def line(self) -> str:
        """The change in one line of text."""
        ratios = f"{rn.ratio(self.before.ratio)} → {rn.ratio(self.row.ratio)}"
        return f"{self.row.benchmark}: {rw.label(self.row)}: {self.verdicts} (ratio {ratios})"


@dataclasses.dataclass(frozen=True)
class Changes:
    """All rows that both runs have, and the numbers of those that only one has."""

    rows: tuple[Change, ...]
    came: int
    went: int
    cautions: tuple[str, ...]
    started: str
    command: str

    @property
    def flips(self) -> list[Change]:
        """Verdicts that went from "same" to "different" or back."""
        return [change for change in self.rows if change.flipped]

    @property
    def unsure(self) -> list[Change]:
        """Other changes of verdict: to or from "too noisy", or none."""
        return [c for c in self.rows if c.row.verdict != c.before.verdict and not c.flipped]

    @property
    def agreement(self) -> str:
        """How far ratios moved, in a sentence; empty where none can be compared."""
        sizes = [abs(change.ratio) for change in self.rows if change.ratio is not None]
        if not sizes:
            return ""
        beyond = sum(size > MARGIN for size in sizes)
        largest = rn.change(max(sizes)).lstrip("+")
        return f"{beyond} of {len(sizes)} ratios moved by more than {100 * MARGIN:g} %; the largest move is {largest}."


def compare(results: Results, previous: Results) -> Changes:
    """Rows of the same key, beside each other."""
    old, new = ({row.key: row for row in r.rows} for r in (previous, results))
    rows = tuple(Change(row, old[key]) for key, row in new.items() if key in old)
    came, went = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    cautions = tuple(_cautions(results, previous))
    return Changes(rows, came, went, cautions, previous.started, previous.command)


def _cautions(results: Results, previous: Results) -> list[str]:
    """Reasons why the two runs may not be compared."""
    found = [
        f"{name}: {_word(previous.environment, name)} then, {_word(results.environment, name)} now"
        for name in ("processor", "cores", "governor", "machine", "kernel", "python", "packages")
        if results.environment.get(name) != previous.environment.get(name)
    ]
    if results.quick != previous.quick:
        found.append("one of the two runs was a quick one")
    for name in sorted(results.environments.keys() & previous.environments.keys()):
        if _lasting(results.environments[name]) != _lasting(previous.environments[name]):
            found.append(f"the environment {name} is not the same")
    return found


def _lasting(environment: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in environment.items() if name not in PASSING}


def _word(environment: Mapping[str, object], name: str) -> str:
    value = environment.get(name, "unknown")
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


def _relative(now: float | None, before: float | None) -> float | None:
    if now is None or before is None or before == 0:
        return None
    return now / before - 1


def table(changes: Sequence[Change]) -> Table:
    """Every row of both runs; flips first, then the largest change of ratio."""
    ordered = sorted(changes, key=lambda c: (not c.flipped, -abs(c.ratio or 0), -abs(c.figure or 0)))
    lines = tuple(Line(_cells(change), _details(change)) for change in ordered)
    return Table("Every row of both runs", "", HEADS, lines, open=False)


def _cells(change: Change) -> tuple[Cell, ...]:
    row, before = change.row, change.before
    texts = (rw.label(row), row.benchmark, row.quantity)
    ratios = (Cell(rn.ratio(before.ratio), before.ratio), Cell(rn.ratio(row.ratio), row.ratio))
    moves = (Cell(rn.change(change.ratio), change.ratio), Cell(rn.change(change.figure), change.figure))
    tone: Tone = "bad" if change.flipped else "unsure" if row.verdict != before.verdict else ""
    text = "" if not row.verdict and not before.verdict else change.verdicts
    return (*map(Cell, texts), Cell(text, tone=tone), *ratios, *moves)


def _details(change: Change) -> tuple[tuple[str, str], ...]:
    row, before = change.row, change.before
    figures = f"{rn.with_unit(before.figure, before.unit)} → {rn.with_unit(row.figure, row.unit)}"
    notes = (("Note before", before.note), ("Note now", row.note))
    return tuple((term, text) for term, text in (("Figure", figures), *notes) if text)
