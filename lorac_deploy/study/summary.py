"""What a study found: means and spreads over seeds, and the tables that compare methods."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from lorac_deploy.study.worker import Row


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample; 0 for a single value) of ``count`` values."""

    mean: float
    deviation: float
    count: int

    def percent(self) -> str:
        """As percent, with the spread where there is one.

        >>> spread([0.5, 0.6]).percent(), spread([0.5]).percent()
        ('55.0 ± 7.1', '50.0')
        """
        if self.count == 1:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the first column holds names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown, its title above it."""
        lines = [f"### {self.title}", "", _line(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, len(values))


def chosen(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that did not fail and have these values."""
    return [r for r in rows if r.failed is None and all(getattr(r, n) == v for n, v in wanted.items())]


def names(rows: Iterable[Row], field: str) -> list[object]:
    """The values of a field, each once, in the grid's order (numbers from small to large)."""
    found = list(dict.fromkeys(getattr(row, field) for row in rows))
    return found if any(isinstance(v, str) for v in found) else sorted(found)


def tables(rows: Sequence[Row], target_gain: float) -> list[Table]:
    """Every table that the grid has something for."""
    found = [accuracy_table(rows), forgetting_table(rows), criteria_table(rows, target_gain)]
    if len(names(rows, "size")) > 1:
        found.append(_along(rows, "size", "Accuracy (%) by number of samples, mean over drifts", "{} samples"))
    if len(names(rows, "wrong")) > 1:
        found.append(_along(rows, "wrong", "Accuracy (%) by share of wrong labels, mean over drifts", "{:.0%} wrong"))
    return found


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Accuracy on drifted test samples: methods by drifts, with most samples and fewest wrong labels."""
    best = plain(rows)
    drifts = names(best, "drift")
    base = ["base", *(f"{100 * chosen(best, drift=d)[0].base_drifted:.1f}" for d in drifts)]
    mean = f"{100 * statistics.fmean(chosen(best, drift=d)[0].base_drifted for d in drifts):.1f}"
    lines = [(*base, mean)]
    for method in names(best, "method"):
        cells = [_percent(chosen(best, method=method, drift=d)) for d in drifts]
        lines.append((str(method), *cells, _percent(chosen(best, method=method))))
    return Table("Accuracy (%) under drift", ("method", *map(str, drifts), "mean"), tuple(lines))


def forgetting_table(rows: Sequence[Row]) -> Table:
    """What adapting costs on clean data: accuracy there before and after."""
    best = plain(rows)
    drifts = names(best, "drift")
    lines = [("base", *[f"{100 * best[0].base_clean:.1f}"] * (len(drifts) + 1))]
    for method in names(best, "method"):
        cells = [_percent(chosen(best, method=method, drift=d), "clean") for d in drifts]
        lines.append((str(method), *cells, _percent(chosen(best, method=method), "clean")))
    return Table("Accuracy (%) on clean data afterwards", ("method", *map(str, drifts), "mean"), tuple(lines))


def criteria_table(rows: Sequence[Row], target_gain: float) -> Table:
    """The five criteria of Aswani et al. (arXiv 2110.10969), and what a device pays besides."""
    wrong = [w for w in names(rows, "wrong") if w]
    columns = ["method", "trained", "interconnections", "samples needed", "s to target", "M multiply-adds a step"]
    columns += ["MB moved a step", "MB saved", "adapter kB", *(f"{w:.0%} wrong labels" for w in wrong)]
    lines = []
    for method in names(rows, "method"):
        own = chosen(rows, method=method)
        if own:
            broken = [_percent(chosen(own, wrong=w, size=_largest(own))) for w in wrong]
            needed = (samples_needed(rows, str(method), target_gain), seconds_needed(rows, str(method), target_gain))
            lines.append((str(method), *_cost_cells(own[0], needed), *broken))
    return Table(f"Five criteria and costs (target: {target_gain:.0%} of the best gain)", tuple(columns), tuple(lines))


def samples_needed(rows: Sequence[Row], method: str, target_gain: float) -> str:
    """The smallest number of samples whose mean accuracy over drifts and seeds reaches the target."""
    target = _target(rows, target_gain)
    clean = chosen(rows, method=method, wrong=_least_wrong(rows))
    for size in names(clean, "size"):
        if _mean(chosen(clean, size=size)) >= target:
            return f"{size}"
    return f"> {_largest(rows)}"


def seconds_needed(rows: Sequence[Row], method: str, target_gain: float) -> str:
    """Median over drifts and seeds of the training time until a run reaches its drift's target."""
    times = []
    for drift in names(rows, "drift"):
        target = _target(chosen(rows, drift=drift), target_gain)
        own = chosen(plain(rows), method=method, drift=drift)
        times += [next((s for s, found in row.curve if found >= target), math.inf) for row in own]
    if not times or not any(row.curve for row in chosen(rows, method=method)):
        return ""
    middle = statistics.median(times)
    return "not reached" if math.isinf(middle) else f"{middle:.1f}"


def as_csv(rows: Sequence[Row]) -> str:
    """All rows, those that failed too; a column for every cost."""
    flat = [{**dataclasses.asdict(row), **row.costs} for row in rows]
    columns = dict.fromkeys(n for row in flat for n in row if n not in ("costs", "curve"))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _along(rows: Sequence[Row], field: str, title: str, label: str) -> Table:
    """Methods by the values of a field, the other one at its best."""
    kept = chosen(rows, wrong=_least_wrong(rows)) if field == "size" else chosen(rows, size=_largest(rows))
    values = names(kept, field)
    lines = [
        (str(method), *(_percent(chosen(kept, method=method, **{field: v})) for v in values))
        for method in names(kept, "method")
    ]
    return Table(title, ("method", *(label.format(v) for v in values)), tuple(lines))


def _cost_cells(row: Row, needed: tuple[str, str]) -> tuple[str, ...]:
    c: Callable[[str], int] = row.costs.__getitem__
    return (
        f"{c('trained_parameters'):,}",
        f"{c('interconnections')}",
        *needed,
        f"{(c('multiply_adds') + c('prefix_multiply_adds')) / 1e6:,.0f}",
        f"{(c('bytes_moved') + c('prefix_bytes_moved')) / 1e6:,.0f}",
        f"{c('saved_bytes') / 1e6:.1f}",
        f"{c('adapter_bytes') / 1e3:,.1f}",
    )


def _target(rows: Sequence[Row], gain: float) -> float:
    """Base plus a share of the best method's gain, with most samples and fewest wrong labels."""
    best = plain(rows)
    base = statistics.fmean(row.base_drifted for row in best)
    return base + gain * max(0.0, max(_mean(chosen(best, method=m)) for m in names(best, "method")) - base)


def plain(rows: Sequence[Row]) -> list[Row]:
    """The rows with most samples and fewest wrong labels."""
    return chosen(rows, size=_largest(rows), wrong=_least_wrong(rows))


def _largest(rows: Sequence[Row]) -> int:
    return max(row.size for row in rows)


def _least_wrong(rows: Sequence[Row]) -> float:
    return min(row.wrong for row in rows)


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row.drifted for row in rows if row.drifted is not None) if rows else -math.inf


def _percent(rows: Sequence[Row], field: str = "drifted") -> str:
    """Mean over rows, and the spread over seeds of that mean."""
    if not rows:
        return ""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(getattr(row, field))
    return spread([statistics.fmean(values) for values in by_seed.values()]).percent()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
