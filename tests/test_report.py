"""The report's parts: what it says of controls and rows, how it compares runs, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_results import HOSTILE, control, every_row, fault, html, plain, results, row

from benchmarks import report, report_changes, report_environment, report_sections, report_words
from benchmarks import report_numbers as rn
from benchmarks.__main__ import BENCHMARKS
from benchmarks.latency_pooled import pooled
from benchmarks.report_render import measured, moment
from benchmarks.report_summary import summary
from benchmarks.report_tables import details, tables, verdict
from benchmarks.rows import save


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0000213, "s", "21.3 µs"),
        (0.9996, "s", "1,000 ms"),
        (61.0, "s", "61.0 s"),
        (999_950, "bytes", "1,000 kB"),
        (9_100_000_000, "bytes", "9,100 MB"),
        (11_173_962, "", "11,173,962"),
        (-0.01234, "%", "-0.0123 %"),
        (0, "bytes", "0 bytes"),
        (None, "s", "none"),
    ],
)
def test_numbers_have_three_digits_and_a_sensible_unit(value: float | None, unit: str, text: str) -> None:
    assert rn.with_unit(value, unit) == text


def test_a_column_has_one_unit() -> None:
    (table,) = tables([row(figure=0.0001), row(figure=0.02, model="a"), row(figure=3.0, model="b")])
    place = [head.title for head in table.heads].index("Median, ms")
    assert [line.cells[place].text for line in table.lines] == ["0.100", "20.0", "3,000"]
    assert [line.cells[place].value for line in table.lines] == [0.0001, 0.02, 3.0]


def test_numbers_that_are_none_are_missing() -> None:
    found = {"a": float("nan"), "b": "0.1", "c": True, "samples": [1.0, float("inf"), "x", 2]}
    assert [rn.finite(found, name) for name in "abcd"] == [None] * 4
    assert rn.samples(found) == [1.0, 2.0]
    assert rn.samples({"samples": "123"}) == []


def test_a_run_whose_controls_came_out_as_they_must_raises_no_alarm() -> None:
    found = summary([row(details={"structure": "drop-in: 12 checks", "must": "same"}), control(), fault()])
    assert found.warnings == ()
    assert [s.state for s in found.statements] == ["holds"] * 4
    assert found.statements[0].text == "1 row of fused against base: 1 same, 0 too noisy, 0 different."


@pytest.mark.parametrize(
    "failing",
    [
        control(verdict="same", ratio=1.001),
        control(verdict="too noisy"),
        control(ratio=0.8),
        fault(details={"must": "different", "structure": "drop-in: 12 checks"}),
        fault(verdict="same", ratio=1.0),
        fault(verdict="too noisy"),
    ],
)
def test_a_control_that_does_not_come_out_as_it_must_is_an_alarm(failing: Any, tmp_path: Path) -> None:
    rows = [row(), control(model="other"), fault(model="other"), failing]
    assert any(report_words.label(failing) in line for line in summary(rows).warnings)
    assert "Do not trust these timings" in html(results(rows), tmp_path)
    assert "Do not trust these timings" not in html(results(rows[:3]), tmp_path)


def test_controls_that_were_not_measured_are_undecided_not_passed() -> None:
    absent = control(figure=None, ratio=None, verdict="", note="no such file")
    found = summary([row(), absent])
    assert [s.state for s in found.statements[2:]] == ["open", "open"]
    assert "nothing shows that this run can tell" in found.statements[2].text
    assert found.warnings == ()


def test_the_mean_over_all_fused_files_is_told_with_its_interval() -> None:
    rows = [row(model=f"net{i}", format=kind, ratio=1 + i / 1000) for i in range(4) for kind in ("onnx", "tflite")]
    text = summary([*rows, *pooled(rows)]).statements[0].text
    assert "8 rows of fused against base" in text
    assert text.endswith("All together: 1.001 (1.000 to 1.003) times the base's latency, same."), text


def test_a_fused_file_that_is_different_or_no_drop_in_is_named() -> None:
    slow = row(verdict="different", ratio=1.05, details={"structure": "not a drop-in: dtype"})
    found = summary([row(model="a"), slow, row(model="b", verdict="too noisy")])
    assert [s.state for s in found.statements[:2]] == ["fails", "fails"]
    assert "1 same, 1 too noisy, 1 different" in found.statements[0].text
    assert found.statements[0].rows == (f"{report_words.label(slow)}: different, 1.050 times base, not a drop-in",)


def test_without_latency_nothing_is_said_of_controls() -> None:
    assert summary([plain("footprint", "pytorch", "pytorch", "installed", 7, "bytes")]).statements == ()


@pytest.mark.parametrize(
    ("given", "tone", "remark"),
    [
        (row(), "good", ""),
        (row(verdict="different"), "bad", "must be same"),
        (row(verdict="too noisy"), "unsure", ""),
        (row(verdict="different", details={}), "plain", ""),
        (control(), "good", ""),
        (control(verdict="same"), "bad", "must be different"),
        (control(verdict="too noisy"), "unsure", "must be different"),
        (control(ratio=0.7), "bad", "must be slower, is faster"),
    ],
)
def test_a_verdict_says_in_words_whether_it_is_what_it_must_be(given: Any, tone: str, remark: str) -> None:
    assert (verdict(given).text, verdict(given).tone, verdict(given).remark) == (given.verdict, tone, remark)


def test_columns_that_never_vary_are_said_once() -> None:
    (table,) = tables([row(variant="base"), row()])
    assert [h.title for h in table.heads] == ["Variant", "Verdict", "Median, ms", "Minimum, ms", "Ratio"]
    assert table.common == "model resnet18, format onnx, runtime onnxruntime, batch 1, precision float32"


def test_sweeps_and_units_have_tables_of_their_own() -> None:
    swept = {"sweep": "rank", "rank": 4}
    rows = [row(quantity="step"), row(quantity="step", settings=swept), row(quantity="step", unit="bytes")]
    assert [table.title for table in tables(rows)] == ["Step", "Step, growth with rank", "Step"]


def test_details_hold_the_rest_but_not_every_sample() -> None:
    own = {
        "minimum": 0.01,
        "ninetieth": 0.03,
        "low": 0.99,
        "high": 1.01,
        "samples": [0.1] * 9,
        "rounds": 12,
        "odd": [1, 0.12345, {"x": "y"}],
    }
    assert dict(details(row(details=own, note="a\nb"))) == {
        "Minimum": "10.0 ms",
        "90th percentile": "30.0 ms",
        "Interval of the ratio": "0.990 to 1.010",
        "Ratio to": "base",
        "Rounds": "12",
        "Odd": "1, 0.123, x y",
        "Single runs kept": "9",
        "Settings": "batch 1, float32",
        "Note": "a\nb",
    }


def test_a_missing_figure_gives_its_reason_in_the_table() -> None:
    (table,) = tables([row(figure=None, ratio=None, verdict="", note="x" * 200), row(model="b")])
    assert table.lines[0].cells[0].remark == "x" * 90 + "…"
    assert ("Note", "x" * 200) in table.lines[0].details
    assert tables([row(figure=None, ratio=None, verdict="", note="x")])[0].heads[1].title == "Median, s"
    assert (table.lines[0].cells[3].text, table.lines[0].cells[3].value) == ("none", None)


def test_two_runs_are_compared_row_by_row() -> None:
    before = [row(), row(model="a", ratio=1.0), row(model="b"), row(model="gone")]
    now = [row(verdict="different", ratio=1.1), row(model="a", ratio=1.05, figure=0.0426, verdict="too noisy")]
    found = report_changes.compare(results([*now, row(model="b"), row(model="new")]), results(before))
    assert (len(found.rows), found.came, found.went, found.cautions) == (3, 1, 1, ())
    assert [change.row.model for change in found.flips] == ["resnet18"]
    assert [change.row.model for change in found.unsure] == ["a"]
    assert found.rows[1].figure == pytest.approx(1.0)
    assert found.agreement == "2 of 3 ratios moved by more than 3 %; the largest move is 9.9 %."
    first, second, _ = report_changes.table(found.rows).lines
    assert [cell.text for cell in first.cells[3:]] == ["same → different", "1.001", "1.100", "+9.9 %", "0.0 %"]
    assert second.cells[3].text == "same → too noisy"


def test_changes_between_machines_and_versions_are_said_but_not_those_of_the_load() -> None:
    now = results([row()])
    machine = {**now.environment, "processor": "another", "load": [9, 9, 9]}
    versions = {**now.environments, "onnxruntime": {"runtimes": {"onnxruntime": "1.30"}}}
    before = dataclasses.replace(now, environment=machine, environments=versions, quick=True)
    assert report_changes.compare(now, before).cautions == (
        "processor: another then, AMD EPYC now",
        "one of the two runs was a quick one",
        "the environment onnxruntime is not the same",
    )


def test_a_figure_in_another_unit_has_not_changed_by_a_number() -> None:
    (change,) = report_changes.compare(results([row()]), results([row(unit="bytes", ratio=0.0)])).rows
    assert (change.figure, change.ratio) == (None, None)


def test_sections_come_in_their_order_and_unknown_ones_last() -> None:
    rows = [plain(name, "v", "r", "q", 1, "") for name in ("zebra", "footprint", "latency", "")]
    found = report_sections.sections(results(rows))
    assert [section.title for section in found] == ["Latency", "Footprint", "Zebra", "Without a name"]
    assert len({section.name for section in found}) == 4
    assert found[2].text == report_sections.OTHER


def test_a_section_says_its_command_and_environments() -> None:
    rows = [row(), row(runtime="", model="a", details={"environment": "bench-ort"}), row(model="b")]
    assert report_environment.names(rows) == ["onnxruntime", "bench-ort"]
    made = results([*rows, row(benchmark="memory")], quick=True)
    assert report_environment.command("latency", made) == "python -m benchmarks latency --quick"
    assert report_environment.command("latency", results(rows)) == "python -m benchmarks all --report report/"


def test_a_failed_environment_gives_its_reason() -> None:
    given = {"a": {"error": "no build"}, "b": {}, "c": {"packages": {"x": "1"}, "n": 2, "cores": 2, "load": [1]}}
    found = dict(report_environment.versions(given, {"n": 3, "cores": 2}))
    assert found == {"a": "error: no build", "b": "nothing is known of it", "c": "x 1; n 2"}


def test_the_head_says_what_was_measured_and_what_was_not() -> None:
    assert measured([row(), row(benchmark="export", model="")]) == (
        "2 figures of latency, export on resnet18. Not in this run: fine-tuning, memory, footprint."
    )
    assert (moment("2026-11-22T10:00:00+02:00"), moment("x")) == ("2026-11-22 08:00 UTC", "x")


def test_the_page_needs_nothing_else_and_is_the_same_each_time(tmp_path: Path) -> None:
    rows = [r for r in every_row() if r.benchmark != "latency" or r.model == "resnet50"]
    made = results(rows)
    text = html(made, tmp_path / "new" / "folder")
    assert text == html(made, tmp_path)
    assert not re.findall(r"https?:|src=|@import|<link|url\((?!#)", text)
    assert not [path for path in tmp_path.iterdir() if path.is_file() and path.name != "index.html"]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1  # what a results file says is no script
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_hostile_text_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    settings = {HOSTILE: HOSTILE, "batch": 1, "sweep": "batch"}
    fields = {"model": HOSTILE, "format": HOSTILE, "runtime": HOSTILE, "reference": HOSTILE, "note": HOSTILE}
    own = {"settings": settings, "details": {HOSTILE: HOSTILE, "structure": HOSTILE, "samples": [1.0, 2.0]}, **fields}
    variants = ("base", "fused", "adapter branch", "fault: extra node")
    rows = [row(benchmark=b, quantity=q, variant=v, **own) for v in variants for b, q in PLACES]
    made = results(rows, command=HOSTILE, started=HOSTILE, environment={HOSTILE: HOSTILE}, environments={HOSTILE: {}})
    before = dataclasses.replace(made, rows=[dataclasses.replace(r, verdict="different") for r in rows])
    text = html(made, tmp_path, before)
    assert text.count("<script>") == 1
    assert "<b>" not in text
    assert text.count("&lt;script&gt;") > 40


PLACES = (("latency", "latency"), ("finetune", "step"), ("memory", "peak memory"), (HOSTILE, HOSTILE), ("export", "x"))


def test_an_empty_results_file_makes_a_page_that_says_so(tmp_path: Path) -> None:
    assert "This results file has no rows" in html(results([]), tmp_path)
    assert "This results file has no rows" not in html(results([row()]), tmp_path)


def test_a_quick_run_is_called_one(tmp_path: Path) -> None:
    assert "A quick run" in html(results([row()], quick=True), tmp_path)
    assert "A quick run" not in html(results([row()]), tmp_path)


def test_the_command_writes_the_page_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "new.json", results([row()]))
    save(tmp_path / "old.json", results([row(), row(model="gone")]))
    arguments = [str(tmp_path / "new.json"), "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 0
    page = tmp_path / "out" / "index.html"
    assert str(page) in capsys.readouterr().out
    assert "Since the previous run" not in page.read_text(encoding="utf-8")
    assert report.main([*arguments, "--previous", str(tmp_path / "old.json")]) == 0
    assert "Rows in both runs: 1, new: 0, no longer there: 1." in page.read_text(encoding="utf-8")
    assert "report" in BENCHMARKS


def broken(**changes: Any) -> str:
    """A results file as text, with fields of the file (or of its row) changed."""
    content = dataclasses.asdict(results([row()]))
    own = {name: changes.pop(name) for name in list(changes) if name in content["rows"][0]}
    content["rows"][0] |= own
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a results file"),
        ("[]", "not a results file"),
        ('{"rows": []}', "missing 6 required"),
        (broken(figure=float("nan")), "must be finite"),
        (broken(ratio=float("inf")), "must be finite"),
        (broken(figure=None), "needs a note"),
        (broken(model=7), "row 1: model is 7, expected text"),
        (broken(figure=True), "row 1: figure is True, expected a number or null"),
        (broken(settings=[]), "row 1: settings is [], expected an object"),
        (broken(settings={"batch": None}), "row 1: setting batch is None, expected text or a number"),
        (broken(seconds="long"), "the file: seconds is 'long', expected a number"),
        (broken(environments={"a": "b"}), "environments: a is 'b', expected an object"),
        (broken(note="\ud800"), "which is no character"),
        (broken(rows=[dataclasses.asdict(row())] * 2), "two rows say"),
    ],
)
def test_what_is_no_results_file_is_refused_with_a_reason(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "given.json"), "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert reason in said
    assert "given.json" in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_or_a_folder_that_is_a_file_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "new.json", results([row()]))
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    for arguments in (
        ["missing.json"],
        ["new.json", "--out", "taken"],
        ["new.json", "--previous", "none.json"],
        ["new.json", "--out", "new.json"],
    ):
        paths = [a if a.startswith("--") else str(tmp_path / a) for a in arguments]
        with pytest.raises(SystemExit, match="2"):
            report.main(paths)
        assert arguments[-1] in capsys.readouterr().err
