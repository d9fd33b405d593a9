"""Tables of docs/browser.md from the results of ``python -m benchmarks web``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.marks import filled

WHO = ("runtime, 1", "page, 1", "runtime, 2", "page, 2")


def agreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each optimizer and number of steps: medians and largest distances over seeds."""
    heads = ("", "steps", "page", "runtime, other order of sums", "runtime, start moved by one unit in the last place")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name, steps in dict.fromkeys((row["optimizer"], row["steps"]) for row in rows):
        of = [row for row in rows if (row["optimizer"], row["steps"]) == (name, steps)]
        cells = [_spread([row[who] for row in of]) for who in ("page", "plain", "moved")]
        lines.append(f"| {name} | {steps} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1e} (up to {max(values):.1e})"


def speed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each network: smallest and median milliseconds of a step."""
    heads = [f"{who} thread{'s' * who.endswith('2')}" for who in WHO]
    lines = [f"| smallest / median | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of = {row["who"]: row for row in rows if row["model"] == model}
        cells = [f"{of[who]['minimum']:,.0f} / {of[who]['median']:,.0f}" for who in WHO]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Fill in the page."""
    p = argparse.ArgumentParser(prog="python -m benchmarks web_page", description=__doc__)
    p.add_argument("results", type=Path, help="what `python -m benchmarks web` wrote")
    p.add_argument("page", type=Path, help="the page; what stands between its marks changes")
    args = p.parse_args(argv)
    found = json.loads(args.results.read_text(encoding="utf-8"))
    text = filled(args.page.read_text(encoding="utf-8"), "agreement", agreement(found["agreement"]))
    args.page.write_text(filled(text, "speed", speed(found["speed"])), encoding="utf-8")
    return 0
