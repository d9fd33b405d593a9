"""Tables of a study, from rows made by hand."""

import csv
import io

from lorac_deploy.study.summary import (
    accuracy_table,
    as_csv,
    criteria_table,
    samples_needed,
    seconds_needed,
    spread,
    tables,
)
from lorac_deploy.study.worker import Row

COSTS = {
    "trained_parameters": 1234,
    "interconnections": 3,
    "multiply_adds": 2_000_000,
    "prefix_multiply_adds": 1_000_000,
    "bytes_moved": 4_000_000,
    "prefix_bytes_moved": 0,
    "saved_bytes": 500_000,
    "adapter_bytes": 2_500,
}


def row(method: str, accuracy: float | None, **fields: object) -> Row:
    made = {"drift": "fog:3", "size": 100, "wrong": 0.0, "seed": 0, "base_drifted": 0.5, "base_clean": 0.9} | fields
    return Row(method=method, drifted=accuracy, clean=0.8, costs=COSTS, **made)  # type: ignore[arg-type]


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]).deviation == 1.0
    assert spread([0.4]).percent() == "40.0"


def test_accuracies_are_means_over_seeds_beside_the_base() -> None:
    rows = [row("a", 0.7), row("a", 0.8, seed=1), row("b", 0.6), row("b", 0.6, seed=1)]
    found = accuracy_table(rows)
    assert found.columns == ("method", "fog:3", "mean")
    assert found.rows == (
        ("base", "50.0", "50.0"),
        ("a", "75.0 ± 7.1", "75.0 ± 7.1"),
        ("b", "60.0 ± 0.0", "60.0 ± 0.0"),
    )


def test_the_mean_over_drifts_spreads_over_seeds_only() -> None:
    rows = [row("a", 0.6), row("a", 0.8, drift="flip"), row("a", 0.6, seed=1), row("a", 0.8, drift="flip", seed=1)]
    assert accuracy_table(rows).rows[1] == ("a", "60.0 ± 0.0", "80.0 ± 0.0", "70.0 ± 0.0")


def test_smaller_sizes_and_wrong_labels_stay_out_of_the_first_table() -> None:
    rows = [row("a", 0.8), row("a", 0.1, size=10), row("a", 0.1, wrong=0.4)]
    assert accuracy_table(rows).rows[1][1] == "80.0"


def test_a_cell_that_failed_leaves_its_place_empty() -> None:
    rows = [
        row("a", 0.8),
        row("a", 0.7, drift="flip"),
        row("b", None, failed="it diverged"),
        row("b", 0.6, drift="flip"),
    ]
    assert accuracy_table(rows).rows[2] == ("b", "", "60.0", "60.0")


def test_samples_needed_is_the_first_size_that_reaches_the_target_and_says_where_none_does() -> None:
    rows = [row("a", acc, size=size) for size, acc in ((10, 0.55), (50, 0.87), (100, 0.9))]
    rows += [row("b", 0.6, size=size) for size in (10, 50, 100)]
    assert samples_needed(rows, "a", 0.9) == "50"  # 0.5 + 0.9 * 0.4 = 0.86
    assert samples_needed(rows, "b", 0.9) == "> 100"


def test_seconds_needed_come_from_the_curve_of_each_drift() -> None:
    rows = [row("a", 0.9, curve=((1.0, 0.6), (2.0, 0.87), (3.0, 0.9))), row("b", 0.6, curve=((9.0, 0.6),))]
    assert seconds_needed(rows, "a", 0.9) == "2.0"
    assert seconds_needed(rows, "b", 0.9) == "not reached"


def test_criteria_have_a_column_for_each_share_of_wrong_labels() -> None:
    rows = [row("a", 0.8), row("a", 0.7, wrong=0.2), row("a", 0.6, wrong=0.4)]
    found = criteria_table(rows, 0.9)
    assert found.columns[-2:] == ("20% wrong labels", "40% wrong labels")
    assert found.rows[0][-2:] == ("70.0", "60.0")
    assert found.rows[0][:3] == ("a", "1,234", "3")
    assert "3" in found.rows[0][5:6]  # both parts of a step, in millions


def test_every_axis_with_several_values_has_a_table() -> None:
    plain = [row("a", 0.8)]
    assert len(tables(plain, 0.9)) == 3
    assert len(tables([*plain, row("a", 0.7, size=10)], 0.9)) == 4
    assert len(tables([*plain, row("a", 0.7, size=10), row("a", 0.7, wrong=0.1)], 0.9)) == 5


def test_csv_has_a_line_for_each_row_and_a_column_for_each_cost() -> None:
    rows = [row("a", 0.8), row("b", None, failed="it diverged, badly")]
    found = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["drifted"] for line in found] == ["0.8", ""]
    assert found[1]["failed"] == "it diverged, badly"
    assert found[0]["multiply_adds"] == "2000000"


def test_markdown_has_a_line_for_each_row() -> None:
    text = accuracy_table([row("a", 0.8)]).markdown()
    assert text.splitlines()[2:] == [
        "| method | fog:3 | mean |",
        "|---|---|---|",
        "| base | 50.0 | 50.0 |",
        "| a | 80.0 | 80.0 |",
    ]
