"""Tables of measured figures on the documentation's pages are those that their results make, to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fleet_page, segmentation, timm_page, web_page
from benchmarks.marks import filled
from benchmarks.timm_row import Row

Found = dict[str, Any]
TABLES: dict[tuple[str, str, str], Callable[[Any], Sequence[str]]] = {
    ("browser.md", "agreement", "web"): lambda found: web_page.agreement(found["agreement"]),
    ("browser.md", "speed", "web"): lambda found: web_page.speed(found["speed"]),
    ("fleet.md", "results", "fleet"): lambda found: [
        *fleet_page.summary(found["rows"]),
        "",
        *fleet_page.per_client(found["rows"]),
    ],
    ("fleet.md", "alone", "fleet_alone"): lambda found: fleet_page.alone(found["rows"]),
    ("fleet.md", "own", "fleet_own"): lambda found: fleet_page.summary(found["rows"]),
    ("fleet.md", "traffic", "fleet_traffic"): lambda found: fleet_page.traffic(found["rows"]),
    ("tasks.md", "networks", "segmentation"): lambda found: segmentation.table([Row(**row) for row in found]),
}


def results(root: Path, name: str) -> Any:
    return json.loads((root / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "mark", "source"), TABLES, ids="-".join)
def test_a_table_is_that_of_its_results(root: Path, page: str, mark: str, source: str) -> None:
    text = (root / "docs" / page).read_text(encoding="utf-8")
    lines = TABLES[page, mark, source](results(root, source))
    assert len(lines) > 3
    assert text == filled(text, mark, lines)
    assert text != filled(text, mark, lines[:-1])


def test_the_page_of_timm_is_that_of_its_results(root: Path) -> None:
    rows = [Row(**row) for row in results(root, "timm")]
    assert (root / "docs" / "timm.md").read_text(encoding="utf-8") == timm_page.page(rows)
    assert sum(row.whole for row in rows) >= 25


def test_figures_in_words_are_those_of_the_results(root: Path) -> None:
    """Sentences that name a mean of the fleets."""
    text = (root / "docs" / "fleet.md").read_text(encoding="utf-8")
    fleets = fleet_page.ways(results(root, "fleet")["rows"])["adapters"]
    federated = sum(fleet_page.means(row)["federated"] for row in fleets) / len(fleets)
    rows = results(root, "fleet_alone")["rows"]
    rates = {row["lr"] for row in rows}
    alone = {r: [100 * sum(row["accuracy"]) / len(row["accuracy"]) for row in rows if row["lr"] == r] for r in rates}
    best = max(sum(values) / len(values) for values in alone.values())
    assert f"gains {federated - best:.1f} points" in " ".join(text.split())
