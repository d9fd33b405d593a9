"""docs/results.md: its marks, plots and commands are real, and its tables say what the rows say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from benchmarks import page_tables
from benchmarks.__main__ import BENCHMARKS
from benchmarks.page import MARKED, PAGE, filled
from benchmarks.page_tables import PLOTS, TABLES
from benchmarks.studies import STUDIES
from lorac_deploy.study.worker import Row

TEXT = PAGE.read_text(encoding="utf-8")
COSTS = {"trained_parameters": 5, "multiply_adds": 60, "prefix_multiply_adds": 40, "saved_bytes": 8}


def row(method: str, drift: str, size: int, seed: int, drifted: float, **fields: object) -> Row:
    return Row(method, drift, size, 0.0, seed, 0.1, 0.9, drifted, 0.8, costs=dict(COSTS), **fields)  # type: ignore[arg-type]


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if "---" not in line]


def test_every_mark_has_a_table() -> None:
    found = [name for _, name, _ in MARKED.findall(TEXT)]
    assert sorted(found) == sorted(TABLES)


def test_plots_are_there_under_the_names_that_the_page_gives_them() -> None:
    named = re.findall(r"\]\(results/(\S+\.png)\)", TEXT)
    assert set(named) == set(PLOTS)
    assert all((PAGE.with_suffix("") / name).is_file() for name in named)


def test_every_command_is_one_that_can_be_given() -> None:
    commands = re.findall(r"^python -m benchmarks (\w+)(?: (\w+))?", TEXT, re.MULTILINE)
    assert {name for name, _ in commands} == {"studies", "advising", "skip"} <= set(BENCHMARKS)
    assert {study for name, study in commands if name == "studies"} == set(STUDIES)


def test_tables_are_filled_in_and_prose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("benchmarks.page.TABLES", {"new": lambda results: f"| {results.name} |\n", "none": absent})
    text = "a\n<!-- table: new -->\nold\n<!-- end -->\nb\n<!-- table: none -->\nkept\n<!-- end -->\nc\n"
    missing: list[str] = []
    found = filled(text, tmp_path / "r", missing)
    assert found == text.replace("old\n", "\n| r |\n\n")
    assert (missing, filled(found, tmp_path / "r", [])) == (["none"], found)
    with pytest.raises(KeyError, match="other"):
        filled(text.replace("none", "other"), tmp_path, [])


def test_claims_are_means_over_drifts_with_the_spread_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {"front": 0.6, "middle": 0.5, "layer3": 0.4, "head": 0.3, "rear": 0.0, "full": 0.7}
    grid = itertools.product(accuracies, ("fog:5", "contrast:5", "flip"), (333, 667, 1000), (0, 1))
    rows = [
        row(m, d, n, s, accuracies[m] + (0.02 if s else 0.0) + (0.1 if d == "fog:5" else 0.0)) for m, d, n, s in grid
    ]
    monkeypatch.setattr(page_tables, "study_rows", lambda *_: rows)
    found = cells(page_tables.blocks_claims(Path()))
    assert found[0] == ["drift, images", "target block", "paper", "block average", "paper", "full", "paper"]
    assert found[1] == ["corruptions, 10 %", "66.0 ± 1.4", "73.5", "51.0 ± 1.4", "70.5", "76.0 ± 1.4", "73.2"]
    assert found[-1] == ["flip, 30 %", "31.0 ± 1.4", "84.9", "46.0 ± 1.4", "57.1", "71.0 ± 1.4", "69.8"]


def test_costs_are_shares_of_full_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("full", "flip", 9, s, 0.5, seconds=20.0) for s in (0, 1)]
    rows += [row("head", "flip", 9, s, 0.5, seconds=seconds) for s, seconds in ((0, 4.0), (1, 6.0))]
    for r in rows[2:]:
        r.costs.update(multiply_adds=0, saved_bytes=2)
    monkeypatch.setattr(page_tables, "study_rows", lambda *_: rows)
    assert cells(page_tables.blocks_time(Path()))[1:] == [
        ["full", "5", "1.00", "1.00", "1.00"],
        ["head", "5", "0.25", "0.40", "0.25"],
    ]


def test_rates_stand_in_columns_and_absent_ones_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("head lr=0.03", "flip", 9, 0, 0.5), row("head lr=0.001", "flip", 9, 0, 0.25)]
    rows += [row("full lr=0.001", "flip", 9, 0, 0.75)]
    monkeypatch.setattr(page_tables, "study_rows", lambda *_: rows)
    assert cells(page_tables.rates(Path())) == [
        ["method, drift", "0.001", "0.03"],
        ["head, flip", "25.0", "50.0"],
        ["full, flip", "75.0", ""],
    ]
