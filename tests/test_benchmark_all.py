"""The whole suite: what is measured is written as it comes, compared with the run before, and never lost."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import all as suite
from benchmarks.rows import Row, load

BAD = {"must": "same", "structure": "drop-in: 12 checks"}


@dataclasses.dataclass(frozen=True)
class Settings:
    python: Mapping[str, Path]
    quick: bool = False

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        return cls(python, quick=True)


def row(name: str, figure: float, **fields: object) -> Row:
    return Row(name, "net", "onnx", "onnxruntime", "fused", "latency", figure, "s", **fields)  # type: ignore[arg-type]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put benchmarks of other rows in the place of the suite's own."""

    def put(name: str, rows: Callable[[Settings, Callable[[str], None]], list[Row]]) -> None:
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", types.SimpleNamespace(Settings=Settings, rows=rows))

    return put


def run(folder: Path, *options: str) -> int:
    return suite.main(["--report", str(folder), "--only", "latency", "memory", *options])


def test_rows_of_all_benchmarks_come_into_one_file_and_one_page(plant: Callable[..., None], tmp_path: Path) -> None:
    plant("latency", lambda settings, say: [row("latency", 1.0)])
    plant("memory", lambda settings, say: [row("memory", 2.0 if settings.quick else 3.0)])
    assert run(tmp_path / "report", "--quick") == 0
    found = load(tmp_path / "report" / "results.json")
    assert [(r.benchmark, r.figure) for r in found.rows] == [("latency", 1.0), ("memory", 2.0)]
    assert found.quick
    assert found.command == f"python -m benchmarks all --report {tmp_path / 'report'} --only latency memory --quick"
    assert "Latency" in (tmp_path / "report" / "index.html").read_text()


def test_a_log_has_lines_of_progress_but_few(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 109.9, 110.1])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = suite.Progress(Console(stderr=True), Console(stderr=True).status(""), "latency")
    for text in ("first", "second", "third", "fourth"):
        progress(text)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in said] == ["latency: first", "latency: fourth"]


def test_a_second_run_is_compared_with_the_first(plant: Callable[..., None], tmp_path: Path) -> None:
    plant("memory", lambda settings, say: [])
    plant("latency", lambda settings, say: [row("latency", 1.0, ratio=1.0, verdict="same")])
    assert run(tmp_path) == 0
    assert "Since the previous run" not in (tmp_path / "index.html").read_text()
    plant("latency", lambda settings, say: [row("latency", 1.2, ratio=1.2, verdict="different")])
    assert run(tmp_path) == 0
    assert load(tmp_path / "previous.json").rows[0].ratio == 1.0
    assert "Since the previous run" in (tmp_path / "index.html").read_text()


def test_what_was_measured_before_a_crash_is_there(plant: Callable[..., None], tmp_path: Path) -> None:
    def crash(settings: Settings, say: Callable[[str], None]) -> list[Row]:
        raise MemoryError("no more")

    plant("latency", lambda settings, say: [row("latency", 1.0)])
    plant("memory", crash)
    with pytest.raises(MemoryError):
        run(tmp_path)
    assert len(load(tmp_path / "results.json").rows) == 1
    assert (tmp_path / "index.html").exists()


def test_something_else_in_the_reports_place_is_not_overwritten(
    plant: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("my own notes")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "is not a results file" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "my own notes"


def test_a_fused_file_that_differs_makes_the_status_1(
    plant: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant("memory", lambda settings, say: [])
    plant("latency", lambda settings, say: [row("latency", 1.0, ratio=1.2, verdict="different", details=BAD)])
    assert run(tmp_path) == 1
    assert "WRONG: net onnx None on onnxruntime: fused must be same and is different" in capsys.readouterr().out


def test_the_suites_benchmarks_have_the_shape_that_is_asked_for() -> None:
    for name in suite.SUITE:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.Settings.smallest(python={}).quick
        assert not module.Settings(python={}).quick
        assert callable(module.rows)
