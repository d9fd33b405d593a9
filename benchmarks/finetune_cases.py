"""What `python -m benchmarks finetune` measures: networks, batches, threads and competitors; whole or quick."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import step_competitors as sc
from benchmarks.rows import Row
from benchmarks.step_cases import Case, image_spec
from benchmarks.step_competitors import Competitor

BENCHMARK = "finetune"
PARTS = ("steps", "target", "growth")
SIZE = 32
DEPTHS = (20, 32, 56, 110)
SIZES = (32, 64, 96, 128)
GROWTH_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Point:
    """One batch of one network, and who trains it. ``swept`` tells rows of a sweep apart from others."""

    model: str
    batch: int
    threads: int
    competitors: tuple[Competitor, ...]
    size: int = SIZE
    epoch_images: int = 0  # none: steps alone
    swept: tuple[tuple[str, str | int], ...] = ()

    @property
    def settings(self) -> dict[str, str | int]:
        """What tells its rows apart."""
        return {"batch": self.batch, "threads": self.threads, "size": self.size, **dict(self.swept)}

    @property
    def title(self) -> str:
        """For lines of progress."""
        return f"{self.model}, " + ", ".join(f"{name} {value}" for name, value in self.settings.items())


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a point is measured: rounds until ``seconds`` are over, ``steps`` counted ones in each turn."""

    seconds: float
    least: int
    most: int
    steps: int = 2
    warmup: int = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure. ``parts`` are some of `PARTS`; ``python`` holds other interpreters of environments, by name."""

    parts: tuple[str, ...] = PARTS
    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: five competitors at one batch size, two short sweeps, five epochs."""
        return cls(quick=True, python=python)

    @property
    def effort(self) -> Effort:
        """For the comparison of competitors."""
        return Effort(1, 3, 4) if self.quick else Effort(15, 4, 12)

    @property
    def growth_effort(self) -> Effort:
        """For sweeps, which have two competitors."""
        return Effort(0.5, 3, 3) if self.quick else Effort(3, 5, 10)

    @property
    def points(self) -> tuple[Point, ...]:
        """Steps and epochs."""
        if self.quick:
            return (Point("resnet20", 8, 2, sc.QUICK, epoch_images=32),)
        every = [Point("resnet20", n, 2, sc.EVERY, epoch_images=256 if n == 32 else 0) for n in (1, 8, 32)]
        every += [Point("resnet20", n, 1, sc.FEWER_COMPILED if n == 32 else sc.EAGER) for n in (1, 8, 32)]
        eager = tuple(c for c in sc.MAIN if not c.label.startswith("PyTorch compiled"))  # it takes a minute to compile
        return (*every, Point("resnet18", 8, 2, (*sc.MAIN, *sc.FORMS)), Point("mobilenet_v2", 8, 2, eager))

    @property
    def sweeps(self) -> tuple[Point, ...]:
        """Growth of ours with rank, batch, depth and image size; ordered so that networks are made once."""
        if self.quick:
            return (*(_rank(r) for r in (1, 4)), *(_swept("batch", n, batch=n) for n in (1, 8)))
        found = [*map(_rank, sc.RANKS), *(_swept("batch", n, batch=n) for n in GROWTH_BATCHES)]
        found += [_swept("depth", depth, model=f"resnet{depth}") for depth in DEPTHS]
        return (*found, *(_swept("size", size, size=size) for size in SIZES))


def _rank(rank: int) -> Point:
    variant = sc.rank_variant(rank)
    trained = dataclasses.replace(sc.ours(sc.REFERENCE, variant), note="layers of every size have adapters")
    return _swept("rank", rank, competitors=(sc.forward(sc.FLOOR, variant), trained))


def _swept(
    what: str,
    value: int,
    *,
    model: str = "resnet20",
    batch: int = 8,
    size: int = SIZE,
    competitors: tuple[Competitor, ...] | None = None,
) -> Point:
    swept: tuple[tuple[str, str | int], ...] = (("sweep", what), (what, value))
    return Point(model, batch, 2, competitors or sc.chosen(sc.FLOOR, sc.REFERENCE), size=size, swept=swept)


class Cases:
    """Networks in a folder that goes with the block; the last one stays until another is asked for."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._held = contextlib.ExitStack()
        self._last: tuple[str, int] | None = None
        self._case: Case | None = None

    def __enter__(self) -> Cases:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()
        self._scratch.cleanup()

    def of(self, model: str, size: int) -> Case:
        """The network called ``model`` for images of ``size`` x ``size``."""
        if self._case is None or self._last != (model, size):
            self._held.close()
            folder = self._held.enter_context(tempfile.TemporaryDirectory(dir=self._scratch.name))
            self._case, self._last = Case(model, Path(folder) / model, spec=image_spec(size)), (model, size)
        return self._case


def row(point: Point, competitor: Competitor, quantity: str, figure: float | None, unit: str) -> Row:
    """A row of a point; ratio, details and note are the caller's."""
    return Row(
        benchmark=BENCHMARK,
        model=point.model,
        format=competitor.format,
        runtime=competitor.environment,
        variant=competitor.label,
        quantity=quantity,
        figure=figure,
        unit=unit,
        settings=point.settings,
        note=competitor.note if figure is not None else "not measured",
    )


def compared(found: Sequence[Row]) -> list[Row]:
    """Every row with its ratio to the reference's of the same model, quantity and settings."""

    def place(one: Row) -> tuple[object, ...]:
        return one.model, one.quantity, *sorted(one.settings.items())

    references = {place(row): row.figure for row in found if row.variant == sc.REFERENCE and row.figure}
    return [
        dataclasses.replace(row, ratio=row.figure / references[place(row)], reference=sc.REFERENCE)
        if row.figure is not None and row.variant != sc.REFERENCE and place(row) in references
        else row
        for row in found
    ]


def refused(point: Point, competitor: Competitor, reason: str, quantities: Mapping[str, str]) -> Iterator[Row]:
    """Rows without a figure, for each quantity and its unit."""
    for quantity, unit in quantities.items():
        yield dataclasses.replace(row(point, competitor, quantity, None, unit), note=shortened(reason))


def noted(*texts: str) -> str:
    """Notes that are not empty, as one.

    >>> noted("no cache", "", "slow")
    'no cache; slow'
    """
    return "; ".join(text for text in texts if text)


def shortened(text: str) -> str:
    """One line, at most 300 characters, of files in temporary folders the names alone."""
    line = " ".join(re.sub(rf"{re.escape(tempfile.gettempdir())}/\S*/", "", text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."
