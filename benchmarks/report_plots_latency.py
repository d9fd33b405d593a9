"""Plots of latency: base and fused overlaid, and every ratio with its interval."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import blended_transform_factory

from benchmarks import report_numbers as rn
from benchmarks import report_words as rw
from benchmarks.report_panels import AREA, LINE, Group, Mark, Panel, grouped, mark, more, shortened
from benchmarks.report_svg import draw, styled
from benchmarks.rows import Row

Pair = tuple[Row, Row]  # base and fused of the same settings
MOST_PAIRS, MOST = 8, 16  # panels
BINS = 40  # at most; fewer where there are few runs
TAIL = 90  # per cent of all runs that a panel shows
BASE = Mark("base", "", "series-1", AREA)
FUSED = Mark("fused", "", "series-2", LINE)
FEW = 3  # ratios; models with no more share a panel
LINE_HEIGHT = 17
MARGIN = 1.0  # per cent: the band of "the same"
LINEAR = 2.0  # per cent: up to here the axis of ratios is linear
TICKS = (0.01, 0.1, 0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 1.5, 3.0, 10.0, 100.0)
ROLES = {
    "fused": mark("fused", "o", "series-2"),
    "other": mark("other files", "D", "series-1"),
    "control": mark("negative controls: must be slower", "s", "series-4"),
    "fault": mark("planted faults: must be caught", "^", "series-6"),
}


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Base and fused with single runs, one pair for each model, format and runtime; those with most variants first.

    Of several settings batch 1 in float32 is taken.
    """
    own = [row for row in rows if (row.benchmark, row.quantity) == ("latency", "latency")]
    places = grouped(own, lambda row: (row.model, row.format, row.runtime))
    found = []
    for place in sorted(places.values(), key=lambda rows: -len({row.variant for row in rows})):
        complete = [pair for same in grouped(place, _settings).values() if (pair := _pair(same))]
        found += sorted(complete, key=_plainness)[:1]
    return found


def _settings(row: Row) -> tuple[object, ...]:
    return tuple(sorted(row.settings.items()))


def _pair(rows: Sequence[Row]) -> Pair | None:
    named = {row.variant: row for row in rows if rn.samples(row.details)}
    return (named["base"], named["fused"]) if {"base", "fused"} <= named.keys() else None


def _plainness(pair: Pair) -> tuple[bool, bool]:
    settings = pair[0].settings
    return settings.get("precision", "float32") != "float32", settings.get("batch", 1) != 1


def distributions(rows: Sequence[Row]) -> Group:
    """Histograms of single runs, base and fused over each other."""
    title = "Distribution of base and fused latency"
    found = pairs(rows)
    if not found:
        return Group(title, "", missing="no single runs of both base and fused were kept")
    text = (
        "Share of single runs by how long they took, in bins of equal width. Where the two are equally fast, the line "
        f"follows the edge of the area. The slowest {100 - TAIL} % of runs lie beyond the right edge."
    )
    common = rw.shared([base for base, _ in found[:MOST_PAIRS]])
    settings = f" All panels: {rw.settings_of(found[0][0], common)}." if common else ""
    panels = tuple(_distribution(f"distribution-{k}", pair, common) for k, pair in enumerate(found[:MOST_PAIRS]))
    return Group(title, text + settings + more(MOST_PAIRS, len(found)), panels, (BASE, FUSED))


def _distribution(name: str, pair: Pair, common: Sequence[str]) -> Panel:
    base, fused = (rn.samples(row.details) for row in pair)
    caption = _join(_place(pair[0]), rw.settings(pair[0], without=common))
    paint = functools.partial(_histograms, base=base, fused=fused)
    return Panel(caption, draw(name, f"Latency of base and fused: {caption}", 200, paint))


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _place(row: Row) -> str:
    both = row.format and row.runtime
    return _join(row.model, f"{row.format} on {row.runtime}" if both else row.format or row.runtime)


def _histograms(axes: Axes, *, base: Sequence[float], fused: Sequence[float]) -> None:
    scale = rn.scale_for([*base, *fused], "s")
    values = [np.asarray(part) / scale.factor for part in (base, fused)]
    every = np.concatenate(values)
    low, high = float(every.min()), float(np.percentile(every, TAIL))
    count = max(8, min(BINS, round(2 * len(every) ** 0.5)))
    bins = np.linspace(low, max(high, low + 1e-3 * abs(low) + 1e-9), count + 1).tolist()
    weights = [np.full(len(part), 100 / len(part)) for part in values]
    axes.hist(values[0], bins, weights=weights[0], alpha=0.45, **styled(color=BASE.colour))
    axes.hist(values[1], bins, weights=weights[1], histtype="step", linewidth=1.6, **styled(color=FUSED.colour))
    axes.set_xlabel(f"latency, {scale.unit}")
    axes.set_ylabel("runs, %")


def ratios(rows: Sequence[Row]) -> Group:
    """Every ratio of latencies as a point with its interval."""
    title = "Latency beside the base"
    own = [r for r in rows if (r.benchmark, r.quantity) == ("latency", "latency")]
    own = [r for r in own if r.ratio is not None and r.ratio > 0 and r.variant != r.reference]
    if not own:
        return Group(title, "", missing="no latency was compared with another")
    text = (
        "Ratio of each file's latency to the base's, with the confidence interval that the verdict rests on. The band "
        f"is 1 ± {MARGIN / 100:g}: an interval within it is the same. The axis is linear in the middle and logarithmic "
        "outside, so that both 1 % and 50 % can be read."
    )
    found = _panels(own)
    drawn = tuple(_forest(f"ratio-{k}", caption, rows) for k, (caption, rows) in enumerate(found[:MOST]))
    return Group(title, text + more(MOST, len(found)), drawn, _legend([r for _, rows in found[:MOST] for r in rows]))


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """A caption and rows for each model, format and runtime; models with few rows share one."""
    places = grouped(rows, lambda row: (row.model, row.format, row.runtime))
    large = [own for own in places.values() if len(own) > FEW]
    few = grouped((row for own in places.values() if len(own) <= FEW for row in own), lambda r: (r.format, r.runtime))
    return [(_caption(own), own) for own in [*large, *few.values()]]


def _caption(rows: Sequence[Row]) -> str:
    """What all rows of a panel share."""
    several = len({row.model for row in rows}) > 1
    first = dataclasses.replace(rows[0], model="Other models") if several else rows[0]
    return _join(_place(first), rw.settings_of(first, rw.shared(rows)))


def _legend(rows: Sequence[Row]) -> tuple[Mark, ...]:
    return tuple(own for name, own in ROLES.items() if name in {role(row) for row in rows})


def role(row: Row) -> str:
    """What a row is there for: a key of `ROLES`."""
    if rw.is_fault(row):
        return "fault"
    if rw.is_control(row):
        return "control"
    return "fused" if row.variant == "fused" else "other"


def _forest(name: str, caption: str, rows: Sequence[Row]) -> Panel:
    lines = forest_lines(rows)
    paint = functools.partial(_intervals, lines=lines)
    return Panel(caption, draw(name, f"Latency ratios: {caption}", 62 + LINE_HEIGHT * len(lines), paint))


def forest_lines(rows: Sequence[Row]) -> list[tuple[str, Row | None]]:
    """Labels from top to bottom, each with its row; a heading has none."""
    common = rw.shared(rows)
    groups = grouped(rows, lambda row: rw.settings(row, without=common))
    if len({row.model for row in rows}) > 1 or len(groups) == 1:
        labels = rw.distinguishing(rows, ("variant", "model"), by_settings=True)
        return list(zip(labels, rows, strict=True))
    found: list[tuple[str, Row | None]] = []
    for settings, own in groups.items():
        found += [(settings, None), *((row.variant, row) for row in own)]
    return found


def _intervals(axes: Axes, *, lines: Sequence[tuple[str, Row | None]]) -> None:
    axes.axvspan(-MARGIN, MARGIN, linewidth=0, **styled(facecolor="band"))
    axes.axvline(0, linewidth=0.8, **styled(color="muted"))
    low, high = -2 * LINEAR, 2 * LINEAR
    for k, (label, row) in enumerate(lines):
        if row is None:
            _heading(axes, k, label)
            continue
        reach = _interval(row)
        low, high = min(low, *reach), max(high, *reach)
        own = ROLES[role(row)]
        axes.plot(reach, (k, k), linewidth=2, **styled(color=own.colour))
        axes.plot(_percent(row.ratio), k, own.marker, markersize=6, **styled(color=own.colour))
    axes.set_yticks([k for k, (_, r) in enumerate(lines) if r], [shortened(text) for text, r in lines if r])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    _axis(axes, low, high)


def _heading(axes: Axes, k: int, text: str) -> None:
    """At the drawing's left edge, where labels of rows begin too."""
    place = blended_transform_factory(axes.figure.transFigure, axes.transData)
    axes.text(0.01, k, shortened(text), transform=place, va="center", fontweight="bold", fontsize=11, in_layout=False)


def _axis(axes: Axes, low: float, high: float) -> None:
    """The axis of ratios, in per cent for matplotlib, in ratios for the reader."""
    places = {_percent(tick): f"{tick:g}" for tick in TICKS}
    low = max((place for place in places if place <= low), default=low) if low < -2 * LINEAR else low
    high = min((place for place in places if place >= high), default=high) if high > 2 * LINEAR else high
    ticks = [place for place in places if low <= place <= high]
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set_xlim(1.15 * low, 1.15 * high)
    axes.set_xticks(ticks, [places[place] for place in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("times the base's latency")


def _interval(row: Row) -> tuple[float, float]:
    ends = (rn.finite(row.details, "low"), rn.finite(row.details, "high"))
    known = [end if end is not None and end > 0 else row.ratio for end in ends]
    return _percent(known[0]), _percent(known[1])


def _percent(ratio: float | None) -> float:
    return 100 * ((1.0 if ratio is None else ratio) - 1)
