"""Figures over a setting: growth of a fine-tuning step, peak memory against batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.report_panels import Group, Mark, Panel, grouped, method_marks, more, namer
from benchmarks.report_svg import draw, styled
from benchmarks.rows import Row

MOST = 8  # panels
HEIGHT = 250
CLOSE = 0.07  # of an axis: ticks nearer than this would touch
ACROSS = {"rank": "rank", "batch": "batch size", "depth": "layers of the network", "size": "image size, pixels"}
Curves = tuple[str, list[Row]]  # the setting that grows, and rows of one panel
Lines = Mapping[str, Sequence[tuple[float, float]]]


def growth(rows: Sequence[Row]) -> Group:
    """Time of a step over each setting that was swept."""
    own = [row for row in rows if (row.benchmark, row.quantity) == ("finetune", "step") and _sweep(row) in ACROSS]
    own = [row for row in own if row.figure is not None and _number(row, _sweep(row)) is not None]
    places = grouped(own, lambda row: (_sweep(row), "" if _sweep(row) == "depth" else row.model))
    panels = [(sweep, places[sweep, model]) for sweep, model in sorted(places, key=_sweep_order)]
    text = "Median time of one fine-tuning step while one setting grows and all others stay; both axes are linear."
    return _group("growth", ("Growth of the step's time", text), panels)


def _sweep(row: Row) -> str:
    return str(row.settings.get("sweep", ""))


def _sweep_order(place: tuple[str, str]) -> int:
    return list(ACROSS).index(place[0])


def memory(rows: Sequence[Row]) -> Group:
    """Peak memory over the batch."""
    own = [row for row in rows if (row.benchmark, row.quantity) == ("memory", "peak memory")]
    own = [row for row in own if row.figure is not None and _number(row, "batch") is not None]
    places = grouped(own, lambda row: (row.model, rw.settings(row, without=("batch",))))
    text = "Largest resident memory of the whole process, with the libraries that it loads; nothing is subtracted."
    return _group("memory", ("Memory against batch", text), [("batch", rows) for rows in places.values()])


def _number(row: Row, name: str) -> float | None:
    value = row.settings.get(name)
    return float(value) if isinstance(value, int | float) else None


def _group(name: str, words: tuple[str, str], panels: Sequence[Curves]) -> Group:
    """A group of line plots with one legend; ``words`` are its title and text."""
    title, text = words
    shown = panels[:MOST]
    if not shown:
        return Group(title, "", missing="nothing was measured over a growing setting")
    every = [row for _, rows in shown for row in rows]
    label = namer(every)
    known = method_marks(every, label)
    drawn = tuple(_panel(f"{name}-{k}", title, curves, label, known) for k, curves in enumerate(shown))
    return Group(title, text + more(MOST, len(panels)), drawn, tuple(known.values()))


def _panel(name: str, title: str, curves: Curves, label: Callable[[Row], str], known: Mapping[str, Mark]) -> Panel:
    setting, rows = curves
    scale = rn.scale_for([row.figure for row in rows], rows[0].unit)
    lines = {
        who: [(_number(row, setting) or 0.0, (row.figure or 0.0) / scale.factor) for row in own]
        for who, own in grouped(rows, label).items()
    }
    caption = _caption(curves)

    def paint(axes: Axes) -> None:
        _paint(axes, lines, known)
        axes.set_xlabel(ACROSS[setting])
        axes.set_ylabel(f"{rows[0].quantity}, {scale.unit}")

    return Panel(caption, draw(name, f"{title}: {caption}", HEIGHT, paint))


def _caption(curves: Curves) -> str:
    """What all rows of a panel share."""
    setting, rows = curves
    first, own = rows[0], {row.model for row in rows}
    differing = [n for n, value in first.settings.items() if any(row.settings.get(n) != value for row in rows)]
    parts = (first.model if len(own) == 1 else "", rw.settings(first, without=("sweep", setting, *differing)))
    return f"By {ACROSS[setting].partition(',')[0]}: " + (", ".join(part for part in parts if part) or "all models")


def _paint(axes: Axes, lines: Lines, known: Mapping[str, Mark]) -> None:
    """A line for each label, from zero upwards."""
    for label, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        own = known[label]
        axes.plot(xs, ys, marker=own.marker, markersize=6, linewidth=1.6, **styled(color=own.colour))
    places = [x for points in lines.values() for x, _ in points]
    ticks = apart(places, max(places) - min(places))
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.8)


def apart(values: Iterable[float], span: float) -> list[float]:
    """Values for ticks, without those that stand too close to the one before.

    >>> apart([1, 2, 8, 32], 31)
    [1, 8, 32]
    """
    found: list[float] = []
    for value in sorted(set(values)):
        if not found or value - found[-1] >= CLOSE * span:
            found.append(value)
    return found
