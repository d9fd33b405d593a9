"""Rows of results: what is no figure is refused, and what is written comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.command import in_unit
from benchmarks.rows import Results, Row, load, save

ROW = Row("latency", "net", "onnx", "onnxruntime", "fused", "latency", 0.5, "s", settings={"batch": 1})


def results(*rows: Row) -> Results:
    return Results("python -m benchmarks latency", "2026-11-22T10:00:00", 3.0, False, {"cores": 2}, {}, list(rows))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"figure": None}, "needs a note that says why"),
        ({"figure": float("nan")}, "must be finite"),
        ({"ratio": float("inf")}, "must be finite"),
        ({"verdict": "perhaps"}, "verdict 'perhaps' is none of 'same', 'different', 'too noisy'"),
    ],
)
def test_a_row_that_says_nothing_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(ROW, **fields)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    absent = dataclasses.replace(ROW, figure=None, variant="base", note="not installed: <b>&")
    save(tmp_path / "new" / "r.json", results(ROW, absent))
    assert load(tmp_path / "new" / "r.json") == results(ROW, absent)


def test_two_rows_of_one_measurement_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two rows say what"):
        save(tmp_path / "r.json", results(ROW, dataclasses.replace(ROW, figure=0.6)))
    assert not (tmp_path / "r.json").exists()
    save(tmp_path / "r.json", results(ROW, dataclasses.replace(ROW, settings={"batch": 8})))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', "\x00", '{"rows": []}'])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="is not a results file"):
        load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [(1.5, "s", "1.5 s"), (0.00012, "s", "120 us"), (2048, "bytes", "2.05 kB"), (None, "%", ""), (0, "s", "0 us")],
)
def test_figures_have_three_digits_in_a_unit_of_their_size(figure: float | None, unit: str, text: str) -> None:
    assert in_unit(figure, unit) == text
