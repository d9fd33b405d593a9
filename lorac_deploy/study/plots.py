"""Plots of a study; matplotlib comes with the extra ``demo``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorac_deploy.study.summary import chosen, names, plain
from lorac_deploy.study.worker import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
COLOURS = 10
MARKERS = "osD^vPX"  # seven, so that no pair of colour and marker repeats below 70 methods


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write every plot that the grid has something for into ``out``; returns their files.

    Raises ImportError where matplotlib is missing.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = [_save(_bars, rows, out / "accuracy.png", wide=True), _save(_cost, rows, out / "cost.png")]
    if len(names(rows, "size")) > 1:
        drawn.append(_save(_sizes, rows, out / "samples.png"))
    if len(names(rows, "wrong")) > 1:
        drawn.append(_save(_wrong, rows, out / "wrong_labels.png"))
    return drawn


def _save(plot: object, rows: Sequence[Row], path: Path, *, wide: bool = False) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5) if wide else (7.5, 4.5), layout="constrained")
    plot(figure.add_subplot(), rows)  # type: ignore[operator]
    part = path.with_name(f"part-{path.name}")
    figure.savefig(part, dpi=DPI)
    part.replace(path)
    return path


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy under every drift, a bar for each method, the base as a line behind them."""
    best = plain(rows)
    drifts, methods = names(best, "drift"), names(best, "method")
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        own = [_drifted(chosen(best, method=method, drift=d)) for d in drifts]
        places = [i + (k - (len(methods) - 1) / 2) * width for i in range(len(drifts))]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in own]
        means = [statistics.fmean(v) if v else 0.0 for v in own]
        hatch = "///" if k % 20 >= COLOURS else None
        axes.bar(
            places,
            means,
            width,
            yerr=deviations,
            color=_colour(k),
            hatch=hatch,
            label=str(method),
            error_kw={"lw": 0.8},
        )
    for i, drift in enumerate(drifts):
        base = 100 * chosen(best, drift=drift)[0].base_drifted
        axes.hlines(base, i - 0.45, i + 0.45, color="black", linestyle=":", label="base" if i == 0 else "_base")
    axes.set_xticks(range(len(drifts)), [str(d).replace("_", " ") for d in drifts], rotation=20, ha="right")
    axes.set_ylabel("accuracy under drift (%)")
    _legend(axes)


def _cost(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy against the multiply-adds of a step, a point for each method."""
    best = plain(rows)
    for k, method in enumerate(names(best, "method")):
        own = chosen(best, method=method)
        work = (own[0].costs["multiply_adds"] + own[0].costs["prefix_multiply_adds"]) / 1e6
        accuracy = statistics.fmean(_drifted(own))
        axes.plot(work, accuracy, _marker(k), color=_colour(k), label=str(method), markersize=8)
    axes.set_xlabel("million multiply-adds of a step")
    axes.set_ylabel("accuracy under drift, mean (%)")
    axes.grid(alpha=0.3)
    _legend(axes)


def _sizes(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, chosen(rows, wrong=min(r.wrong for r in rows)), "size", "labelled samples")


def _wrong(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, chosen(rows, size=max(r.size for r in rows)), "wrong", "share of wrong labels")


def _lines(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    for k, method in enumerate(names(rows, "method")):
        values = names(chosen(rows, method=method), field)
        means = [statistics.fmean(_drifted(chosen(rows, method=method, **{field: v}))) for v in values]
        axes.plot(values, means, f"{_marker(k)}-", color=_colour(k), label=str(method))  # type: ignore[arg-type]
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy under drift, mean (%)")
    axes.grid(alpha=0.3)
    _legend(axes)


def _colour(k: int) -> str:
    return f"C{k % COLOURS}"


def _marker(k: int) -> str:
    return MARKERS[k % len(MARKERS)]


def _legend(axes: Axes) -> None:
    """Beside the plot, where it hides nothing."""
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _drifted(rows: Sequence[Row]) -> list[float]:
    """Accuracies in percent."""
    return [100 * row.drifted for row in rows if row.drifted is not None]
