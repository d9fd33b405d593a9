"""Which plots each benchmark's section has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import report_plots_latency as latency
from benchmarks.report_panels import Group
from benchmarks.report_plots_bars import footprint
from benchmarks.report_plots_cost import cost
from benchmarks.report_plots_curves import growth, memory
from benchmarks.rows import Row

PLOTS: dict[str, tuple[Callable[[Sequence[Row]], Group], ...]] = {
    "latency": (latency.distributions, latency.ratios),
    "finetune": (cost, growth),
    "memory": (memory,),
    "footprint": (footprint,),
}


def plots(benchmark: str, rows: Sequence[Row]) -> list[Group]:
    """All plots of a section; one without data says so."""
    return [make(rows) for make in PLOTS.get(benchmark, ())]
