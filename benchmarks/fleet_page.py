"""Tables and the plot of docs/fleet.md from the results of ``python -m benchmarks fleet``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.marks import filled
from lorac_deploy.fleet.plot import draw
from lorac_deploy.fleet.simulation import ClientResult

COLUMNS = ("base", "local", "federated")


def means(row: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy over the clients of a fleet, in percent."""
    return {c: 100 * statistics.fmean(client[c] for client in row["clients"].values()) for c in COLUMNS}


def ways(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The fleets of each way, in order of appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["way"], []).append(row)
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 3.0]), spread([2.0])
    ('2.0 ± 1.4', '2.0')
    """
    shown = f"{statistics.fmean(values):.1f}"
    return f"{shown} ± {statistics.stdev(values):.1f}" if len(values) > 1 else shown


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each way: accuracies over seeds, gains, and the largest errors of averaging in any round."""
    lines = [
        "| | seeds | before % | alone % | federated % | gain over before | over alone "
        "| error of the mean kept by factors | of A and B averaged apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, fleets in ways(rows).items():
        found = [means(row) for row in fleets]
        cells = [spread([m[c] for m in found]) for c in COLUMNS]
        cells += [spread([m["federated"] - m[c] for m in found]) for c in ("base", "local")]
        cells += [f"{100 * max(max(row[e]) for row in fleets):.1f} %" for e in ("truncation", "apart")]
        lines.append(f"| {way} | {len(fleets)} | {' | '.join(cells)} |")
    return lines


def clients(rows: Sequence[dict[str, Any]]) -> list[ClientResult]:
    """Means over seeds for each client of the first way."""
    fleets = next(iter(ways(rows).values()))
    found = []
    for name in fleets[0]["clients"]:
        own = {c: statistics.fmean(row["clients"][name][c] for row in fleets) for c in COLUMNS}
        found.append(ClientResult(name, 0, own["base"], own["local"], own["federated"]))
    return found


def per_client(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each client of the first way, with the spread over seeds."""
    fleets = next(iter(ways(rows).values()))
    lines = ["| client, by its drift | before % | alone % | federated % |", "|---|---|---|---|"]
    for name in fleets[0]["clients"]:
        cells = [spread([100 * row["clients"][name][c] for row in fleets]) for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def alone(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each learning rate of `benchmarks.fleet_alone`: mean accuracy of the clients, over seeds."""
    lines = ["| peak learning rate | alone % |", "|---|---|"]
    for rate in sorted({row["lr"] for row in rows}, reverse=True):
        found = [100 * statistics.fmean(row["accuracy"]) for row in rows if row["lr"] == rate]
        lines.append(f"| {rate:g} | {spread(found)} |")
    return lines


def traffic(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each case of `benchmarks.fleet_traffic`."""
    lines = [
        "| | base.onnx, bytes | tensors, one way | of the model | on the wire, up | down | of the model, both ways |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"{r['model']}, rank {r['rank']}{', lora_a frozen' if r['freeze_a'] else ''}, {r['numbers']}"
        cells = [f"{r['model_bytes']:,}", f"{r['tensors']:,}", f"{100 * r['tensors_share']:.2f} %"]
        cells += [f"{r['up']:,.0f}", f"{r['down']:,.0f}", f"{100 * r['wire_share']:.2f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Fill in the page and draw the plot."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fleet_page", description=__doc__)
    p.add_argument("results", type=Path, help="what `python -m benchmarks fleet` wrote")
    p.add_argument("traffic", type=Path, help="what `python -m benchmarks fleet_traffic` wrote")
    p.add_argument(
        "page", type=Path, help="the page; what stands between <!-- results --> and <!-- /results --> changes"
    )
    p.add_argument("--alone", type=Path, required=True, help="what `python -m benchmarks fleet_alone` wrote")
    p.add_argument("--own", type=Path, required=True, help="what `python -m benchmarks fleet --own` wrote")
    p.add_argument("--plot", type=Path, required=True, help="the plot to draw")
    args = p.parse_args(argv)
    paths = (args.results, args.traffic, args.alone, args.own)
    rows, sent, apart, own = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths)
    text = filled(args.page.read_text(encoding="utf-8"), "results", [*summary(rows), "", *per_client(rows)])
    for mark, lines in (("traffic", traffic(sent)), ("alone", alone(apart)), ("own", summary(own))):
        text = filled(text, mark, lines)
    args.page.write_text(text, encoding="utf-8")
    draw(clients(rows), args.plot)
    return 0
