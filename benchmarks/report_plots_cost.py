"""Accuracy of fine-tuning methods against the time that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.report_panels import Group, Mark, Panel, grouped, method_marks, more, namer
from benchmarks.report_svg import draw, styled
from benchmarks.rows import Row

MOST = 6  # panels
HEIGHT = 260
ACCURACY = "accuracy"
COSTS = {
    "time to target": "time to the target accuracy",
    "epoch": "time of an epoch",
    "time per epoch": "time of an epoch",
}
TITLE = "Cost against accuracy"
Point = tuple[Row, Row]  # what it costs, how accurate it is


def points(rows: Sequence[Row]) -> list[Point]:
    """Costs beside accuracies of the same method on the same settings, of the first kind of cost that there is."""
    known = [row for row in rows if row.benchmark == "finetune" and row.figure is not None]
    accuracies = [row for row in known if row.quantity == ACCURACY]
    for quantity in COSTS:
        found = [(row, a) for row in known if row.quantity == quantity for a in accuracies if _belong(row, a)]
        if found:
            return found
    return []


def _belong(cost: Row, accuracy: Row) -> bool:
    """Same method, and no setting that both have differs."""
    names = ("model", "format", "variant", "runtime")
    shared = cost.settings.keys() & accuracy.settings.keys()
    same = all(getattr(cost, name) == getattr(accuracy, name) for name in names)
    return same and all(cost.settings[name] == accuracy.settings[name] for name in shared)


def cost(rows: Sequence[Row]) -> Group:
    """Accuracy over time, a marker for each method and engine."""
    found = points(rows)
    if not found:
        return Group(TITLE, "", missing="no method has both an accuracy and a time (to the target, or of an epoch)")
    costs = [row for row, _ in found]
    name = namer(costs)
    known = method_marks(costs, name)
    panels = [*grouped(found, lambda point: (point[0].model, rw.settings(point[0]))).values()]
    drawn = tuple(_panel(f"cost-{k}", own, name, known) for k, own in enumerate(panels[:MOST]))
    text = "Each marker is a method on an engine; further left is quicker, further up more accurate."
    text += _absent(rows, found)
    return Group(TITLE, text + more(MOST, len(panels)), drawn, tuple(known.values()))


def _absent(rows: Sequence[Row], found: Sequence[Point]) -> str:
    """Who has no marker, in a sentence."""
    quantity = found[0][0].quantity
    absent = [f"{r.variant} ({r.runtime})" for r in rows if r.quantity == quantity and r.figure is None]
    return f" Without a time, hence without a marker: {', '.join(dict.fromkeys(absent))}." if absent else ""


def _panel(name: str, found: Sequence[Point], label: Callable[[Row], str], known: Mapping[str, Mark]) -> Panel:
    row = found[0][0]
    scale = rn.scale_for([own.figure for own, _ in found], row.unit)
    caption = ", ".join(part for part in (row.model, rw.settings(row)) if part)

    def paint(axes: Axes) -> None:
        for own, accuracy in found:
            mark = known[label(own)]
            across, up = (own.figure or 0.0) / scale.factor, accuracy.figure or 0.0
            axes.plot(across, up, mark.marker, markersize=9, **styled(color=mark.colour))
        axes.set_xlim(left=0)
        axes.margins(y=0.12)
        axes.grid(linewidth=0.8)
        axes.set_xlabel(f"{COSTS[row.quantity]}, {scale.unit}")
        axes.set_ylabel(f"accuracy, {found[0][1].unit}".rstrip(", "))

    return Panel(caption, draw(name, f"{TITLE}: {caption}", HEIGHT, paint))
