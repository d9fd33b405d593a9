"""Bars of what a device has to hold: installed megabytes, and memory after the imports."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.report_panels import Group, Panel, shortened
from benchmarks.report_svg import draw, styled
from benchmarks.rows import Row

MOST = 16  # bars
BAR = 26  # height of one
TITLE = "What a device holds"
PANELS = {"installed": "Installed on disk", "resident after import": "Resident memory after the imports"}


def footprint(rows: Sequence[Row]) -> Group:
    """A panel for each quantity, a bar for each way to fine-tune."""
    own = [row for row in rows if row.benchmark == "footprint" and row.figure is not None]
    found = {quantity: [row for row in own if row.quantity == quantity] for quantity in PANELS}
    panels = tuple(_panel(f"footprint-{k}", q, rows) for k, (q, rows) in enumerate(found.items()) if rows)
    if not panels:
        return Group(TITLE, "", missing="neither installed bytes nor resident memory were measured")
    return Group(TITLE, "Each bar is one environment; shorter is better.", panels)


def _panel(name: str, quantity: str, rows: Sequence[Row]) -> Panel:
    shown = sorted(rows, key=lambda row: row.figure or 0.0)[:MOST]
    labels = rw.distinguishing(shown, ("variant", "runtime", "model"), by_settings=True)
    scale = rn.scale_for([row.figure for row in shown], shown[0].unit)
    values = [(row.figure or 0.0) / scale.factor for row in shown]

    def paint(axes: Axes) -> None:
        places = range(len(shown))
        axes.barh(places, values, height=0.62, **styled(color="series-1"))
        for place, value in zip(places, values, strict=True):
            axes.annotate(rn.significant(value), (value, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [shortened(label) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 1.22 * max([*values, 1e-9]))
        axes.set_xlabel(f"{quantity}, {scale.unit}")

    height = 58 + BAR * len(shown)
    return Panel(PANELS[quantity], draw(name, f"{TITLE}: {quantity}, {scale.unit}", height, paint))
