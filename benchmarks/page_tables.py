"""The tables of docs/results.md, each made of the results of one benchmark."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import advising, skip
from lorac_deploy.study.bench import open_bench
from lorac_deploy.study.cells import grid
from lorac_deploy.study.config import read_config
from lorac_deploy.study.summary import (
    Spread,
    Table,
    accuracy_table,
    chosen,
    criteria_table,
    forgetting_table,
    names,
    plain,
    spread,
    tables,
)
from lorac_deploy.study.worker import Row, read_row, row_file

STUDIES = "studies"
PARTS = ("front", "middle", "layer3", "head")  # the four blocks of TBFT
SIZES = {333: "10 %", 667: "20 %", 1000: "30 %"}
PAPER = {  # arXiv 2403.15905: target block, block average, full
    "corruptions": {"10 %": (73.53, 70.53, 73.21), "20 %": (75.32, 71.44, 75.29), "30 %": (76.75, 72.19, 76.78)},
    "flip": {"10 %": (84.43, 46.08, 50.86), "20 %": (84.87, 53.65, 62.65), "30 %": (84.91, 57.14, 69.81)},
}
TARGET = {"corruptions": "front", "flip": "head"}
PLOTS = {
    "blocks.png": f"{STUDIES}/blocks/accuracy.png",
    "methods_cost.png": f"{STUDIES}/methods/cost.png",
    "methods_samples.png": f"{STUDIES}/methods/samples.png",
    "labels.png": f"{STUDIES}/labels/wrong_labels.png",
    "deep.png": f"{STUDIES}/deep/accuracy.png",
    "unlabelled.png": f"{STUDIES}/unlabelled/accuracy.png",
}


def study_rows(results: Path, name: str) -> list[Row]:
    """The rows of a study, in its grid's order. Raises FileNotFoundError where it is not finished."""
    path = results / STUDIES / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(path)
    bench = open_bench(read_config(path), path.with_suffix(""))
    rows = [read_row(row_file(bench, cell)) for cell in grid(bench.config)]
    if any(row is None for row in rows):
        raise FileNotFoundError(f"{name}: {rows.count(None)} of {len(rows)} cells are missing")
    return [row for row in rows if row is not None]


def blocks_claims(results: Path) -> str:
    """TBFT's claims beside ours."""
    rows = study_rows(results, "blocks")
    lines = []
    for kind, target in TARGET.items():
        own = [r for r in rows if (r.drift == "flip") == (kind == "flip")]
        for size, share in SIZES.items():
            same = chosen(own, size=size)
            found = [chosen(same, method=target), [r for r in same if r.method in PARTS], chosen(same, method="full")]
            ours = [_over_seeds(part).percent() for part in found]
            theirs = [f"{value:.1f}" for value in PAPER[kind][share]]
            lines.append((f"{kind}, {share}", *(cell for pair in zip(ours, theirs, strict=True) for cell in pair)))
    columns = ("drift, images", "target block", "paper", "block average", "paper", "full", "paper")
    return _markdown(Table("", columns, tuple(lines)))


def blocks_time(results: Path) -> str:
    """What each block costs, beside full training: time, multiply-adds and activations."""
    rows = plain(study_rows(results, "blocks"))
    full = _cost(chosen(rows, method="full"))
    lines = []
    for method in names(rows, "method"):
        own = chosen(rows, method=method)
        ratios = (f"{value / reference:.2f}" for value, reference in zip(_cost(own), full, strict=True))
        lines.append((str(method), f"{own[0].costs['trained_parameters']:,}", *ratios))
    return _markdown(
        Table("", ("what trains", "parameters", "time", "multiply-adds", "saved activations"), tuple(lines))
    )


def ranks_grid(results: Path) -> str:
    """Accuracy by rank and alpha / rank."""
    rows = study_rows(results, "ranks")
    ratios, lines = ("0.5", "1", "2", "4"), []
    for rank in (1, 2, 4, 8, 16):
        own = [chosen(rows, method=f"r={rank} alpha/r={ratio}") for ratio in ratios]
        lines.append(
            (str(rank), f"{own[0][0].costs['trained_parameters']:,}", *(_over_seeds(o).percent() for o in own))
        )
    mean = [_over_seeds([r for r in rows if r.method.endswith(f"alpha/r={ratio}")]).percent() for ratio in ratios]
    columns = ("r", "parameters", *(f"alpha / r = {ratio}" for ratio in ratios))
    return _markdown(Table("", columns, (*lines, ("mean", "", *mean))))


def ranks_forms(results: Path) -> str:
    """Layouts, rank modes and the other options of LoRA-C at r = 4."""
    rows = [row for row in study_rows(results, "ranks") if "alpha/r" not in row.method]
    return _by_drift(rows)


def rates(results: Path) -> str:
    """Accuracy by learning rate, method by method."""
    rows = study_rows(results, "rates")
    found = [str(name).partition(" lr=") for name in names(rows, "method")]
    values = sorted({rate for _, _, rate in found}, key=float)
    lines = []
    for method in dict.fromkeys(method for method, _, _ in found):
        for drift in names(rows, "drift"):
            own = [chosen(rows, method=f"{method} lr={rate}", drift=drift) for rate in values]
            lines.append((f"{method}, {drift}", *(_over_seeds(o).percent() if o else "" for o in own)))
    return _markdown(Table("", ("method, drift", *values), tuple(lines)))


def advice(name: str) -> Callable[[Path], str]:
    """The block that was chosen, beside the best."""

    def table(results: Path) -> str:
        raw = json.loads((results / STUDIES / name).read_text(encoding="utf-8"))
        return advising.table([advising.Row(**row) for row in raw["rows"]])

    return table


def skipping(results: Path) -> str:
    """Time and accuracy with a cache."""
    raw = json.loads((results / "skip.json").read_text(encoding="utf-8"))
    return skip.table([skip.Row(**row) for row in raw["rows"]])


def _study(name: str, table: Callable[[Sequence[Row]], Table]) -> Callable[[Path], str]:
    return lambda results: _markdown(table(study_rows(results, name)))


def _criteria(rows: Sequence[Row]) -> Table:
    return criteria_table(rows, 0.9)


def _last(rows: Sequence[Row]) -> Table:
    """The table along sizes or shares of wrong labels."""
    return tables(rows, 0.9)[-1]


TABLES: dict[str, Callable[[Path], str]] = {
    "blocks-claims": blocks_claims,
    "blocks-each": _study("blocks", accuracy_table),
    "blocks-time": blocks_time,
    "advice": advice("advising.json"),
    "advice-unseen": advice("advising_unseen.json"),
    "skip": skipping,
    "ranks-grid": ranks_grid,
    "ranks-forms": ranks_forms,
    "rates": rates,
    "deep": _study("deep", accuracy_table),
    "deep-clean": _study("deep", forgetting_table),
    "icons": _study("icons", accuracy_table),
    "unlabelled": _study("unlabelled", accuracy_table),
    "unlabelled-clean": _study("unlabelled", forgetting_table),
    "methods": _study("methods", accuracy_table),
    "methods-clean": _study("methods", forgetting_table),
    "methods-criteria": _study("methods", _criteria),
    "methods-samples": _study("methods", _last),
    "labels": _study("labels", _last),
}


def _over_seeds(rows: Sequence[Row]) -> Spread:
    """Mean over everything but the seed, and the spread of that over seeds."""
    found = [[r.drifted for r in rows if r.seed == seed and r.drifted is not None] for seed in {r.seed for r in rows}]
    return spread([statistics.fmean(values) for values in found])


def _cost(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(median seconds of training, multiply-adds and saved bytes of a step)."""
    costs = rows[0].costs
    work = costs["multiply_adds"] + costs["prefix_multiply_adds"]
    return statistics.median(r.seconds for r in rows if r.seconds is not None), work, costs["saved_bytes"]


def _by_drift(rows: Sequence[Row]) -> str:
    table = accuracy_table(rows)
    kept = [line for line in table.rows if line[0] != "base"]
    counts = {str(r.method): f"{r.costs['trained_parameters']:,}" for r in rows}
    lines = tuple((line[0], counts[line[0]], *line[1:]) for line in kept)
    return _markdown(dataclasses.replace(table, columns=("method", "parameters", *table.columns[1:]), rows=lines))


def _markdown(table: Table) -> str:
    """Without the title: the page has headings of its own."""
    return "\n".join(table.markdown().splitlines()[2:])
