"""The export benchmark: every conversion is measured or says why not, and files of other answers are noticed."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import export, export_ours, fusing
from benchmarks import export_conversions as ec
from benchmarks import interpreters as envs
from benchmarks.converting import converted
from benchmarks.export_compare import RUNNERS, compared
from benchmarks.export_rows import ANSWERS, MEMORY, SIZE, TIME, conversion_rows, fusing_rows, size_of
from benchmarks.networks import Network
from benchmarks.rows import Row, check_unique
from benchmarks.tflite_convert import CONVERTERS

HERE = Path(sys.executable)
HALF, INT8 = ec.TFLITE["fp16"], ec.TFLITE["int8"]
SAID = {"seconds": 1.0, "stages": {"all": 1.0}, "whole_seconds": 2.0, "imported_bytes": 10, "peak_bytes": 20}


def tiny(seed: int) -> Network:
    """Two convolutions and a classifier, on images of 8 x 8."""
    torch.manual_seed(seed)
    convolutions = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return Network("tiny", nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10)).eval(), (3, 8, 8))


@pytest.fixture(scope="module")
def net() -> Network:
    return tiny(0)


@pytest.fixture(scope="module")
def folder(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's sources, and what our converters make of them."""
    out = tmp_path_factory.mktemp("export")
    ec.write_sources(net, out)
    for conversion in (ec.CANONICAL, HALF, INT8, ec.ARTIFACT["onnxruntime"]):
        export_ours.CONVERTERS[conversion.name](out / conversion.file, conversion.target(out))
    return out


@pytest.mark.parametrize("name", ["networks", "export_compare"])
def test_examples_in_docstrings_hold(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert (tried.attempted > 0, tried.failed) == (True, 0)


def test_every_conversion_has_a_worker_an_environment_and_a_source(folder: Path) -> None:
    workers = {ec.OUR_WORKER: export_ours.CONVERTERS, ec.OTHERS_WORKER: CONVERTERS}
    assert len({c.name for c in ec.CONVERSIONS}) == len(ec.CONVERSIONS)
    for conversion in ec.CONVERSIONS:
        assert conversion.name in workers[conversion.worker]
        assert conversion.environment in envs.NAMES
        assert (folder / conversion.file).is_file()


# A worker like the others, without their imports: it "converts" by allocating memory and sleeping.
WORKER = """
import sys, time
from pathlib import Path
from benchmarks.tflite_convert import Call, main

def convert(source: Path, target: Path) -> Call:
    with Call() as call:
        print("noise")
        numbers = b"1" * 100_000_000
        call.stage("allocating")
        time.sleep(0.05)
        target.write_bytes(source.read_bytes() * 2)
    time.sleep(0.05)
    return call

sys.exit(main({"x": convert}))
"""


def test_a_worker_says_what_it_took(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    command = [sys.executable, "-c", WORKER, "x", str(tmp_path / "a"), str(tmp_path / "b")]
    said = json.loads(subprocess.run(command, cwd=envs.ROOT, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "b").read_bytes() == b"abab"
    assert 0 < said["stages"]["allocating"] <= said["seconds"] - 0.05
    assert said["seconds"] + 0.05 <= said["whole_seconds"]
    assert said["peak_bytes"] > said["imported_bytes"] + 95e6
    assert "numpy" in said["environment"]["packages"]


def test_a_worker_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"onnx3tf: .*KeyError: 'onnx3tf'"):
        converted(HERE, ec.OTHERS_WORKER, "onnx3tf", tmp_path / "x.onnx", tmp_path / "x.tflite")


def test_files_are_compared_with_ours_and_other_answers_are_noticed(
    net: Network, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ec.TFLITE["float32"]
    ec.write_sources(tiny(1), tmp_path)
    export_ours.CONVERTERS[other.name](tmp_path / other.file, other.target(folder))
    conversions = (ec.CANONICAL, HALF, INT8, other, ec.ARTIFACT["onnxruntime"])
    monkeypatch.setattr("benchmarks.export_compare.CONVERSIONS", conversions)
    made = {c.name: ec.Made() for c in conversions}
    found = compared(net, folder, made, {envs.LITERT: HERE})
    assert found[ec.CANONICAL.name] < 1e-5
    assert 1e-6 < found[HALF.name] < 5e-3
    assert found[HALF.name] < found[INT8.name] < 0.3
    assert found[other.name] > 0.01
    assert "base.onnx" in found[ec.ARTIFACT["onnxruntime"].name]


def test_a_runtime_or_file_that_lacks_is_said(net: Network, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.export_compare.CONVERSIONS", (HALF,))
    assert "--python" in str(compared(net, folder, {HALF.name: ec.Made()}, {envs.LITERT: Path("no/python")})[HALF.name])
    assert compared(net, folder, {HALF.name: ec.Made(reason="fails")}, {})[HALF.name] == "fails"


def run_rounds(
    monkeypatch: pytest.MonkeyPatch, convert: Callable[[str], dict[str, Any]], settings: export.Settings
) -> Mapping[str, ec.Made]:
    """`conversions` with ``convert`` in the place of processes, every environment being there."""
    monkeypatch.setattr(export, "converted", lambda _python, _module, name, _source, _target: convert(name))
    monkeypatch.setattr(envs, "lacking", lambda name: "")
    return export.conversions(Path("unused"), settings, lambda _: None)


def test_rounds_are_interleaved_and_a_slow_converter_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    made = run_rounds(monkeypatch, lambda name: log.append(name) or SAID, export.Settings(rounds=3))  # type: ignore[func-returns-value]
    assert {name: len(one.said) for name, one in made.items()} == {
        c.name: 1 if c.name == envs.ONNX2TF else 3 for c in ec.CONVERSIONS
    }
    assert log.index(ec.CANONICAL.name) == 0
    assert sorted(log[: len(ec.CONVERSIONS)]) == sorted(c.name for c in ec.CONVERSIONS)


def test_a_converter_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(name: str) -> dict[str, Any]:
        if name == envs.LITERT_TORCH:
            raise RuntimeError("litert-torch: no such operator")
        return SAID

    made = run_rounds(monkeypatch, convert, export.Settings(rounds=2))
    assert made[envs.LITERT_TORCH].reason == "fails: litert-torch: no such operator"
    assert len(made[envs.EXECUTORCH].said) == 2


def test_quick_leaves_out_what_is_slow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = export.Settings.smallest({})
    monkeypatch.setattr(envs, "lacking", lambda name: "not installed: no wheel")
    reasons = {c.name: export.absent(c, quick) for c in ec.CONVERSIONS}
    assert "--quick" in reasons[envs.ONNX2TF]
    assert "no wheel" in reasons[envs.ONNXSIM]
    assert reasons[ec.CANONICAL.name] == reasons[INT8.name] == ""
    assert "no wheel" in export.absent(ec.CONVERSIONS[-2], export.Settings())


def test_slow_converters_run_for_the_first_network(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def convert(_python: Path, _module: str, name: str, _source: Path, _target: Path) -> dict[str, Any]:
        done.append(name)
        return SAID

    slow, some = ec.CONVERSIONS[-3], (ec.CANONICAL, ec.CONVERSIONS[-3], ec.CONVERSIONS[-1])
    for name in ("network", "write_sources", "conversion_rows", "fusing_rows"):
        monkeypatch.setattr(export, name, lambda *_: [])
    monkeypatch.setattr(export, "compared", lambda *_: dict.fromkeys([c.name for c in some], 0.0))
    monkeypatch.setattr(export, "CONVERSIONS", some)
    monkeypatch.setattr(export, "converted", convert)
    monkeypatch.setattr(envs, "lacking", lambda name: "")
    export.rows(export.Settings(rounds=1), lambda _: None)
    assert sorted(done) == sorted([ec.CANONICAL.name, envs.ONNXSIM] * 2 + [envs.ONNX2TF])
    reason = export.absent(slow, export.Settings(), first=False)
    assert reason == "left out: takes minutes, so it runs for the first network, mobilenet_v2:128"


def all_rows(net: Network, folder: Path, made: dict[str, ec.Made]) -> list[Row]:
    return [row for c in ec.CONVERSIONS for row in conversion_rows(c, net, folder, made, 1e-6)]


def test_rows_compare_other_tflite_files_with_ours(net: Network, tmp_path: Path) -> None:
    made = {c.name: ec.Made([SAID, {**SAID, "seconds": 3.0}]) for c in ec.CONVERSIONS}
    made[envs.LITERT_TORCH] = ec.Made([{**SAID, "seconds": 8.0}])
    made[envs.EXECUTORCH] = ec.Made(reason="not installed: no wheel")
    for conversion in ec.CONVERSIONS:
        conversion.target(tmp_path).write_bytes(b"12345678")
    found = all_rows(net, tmp_path, made)
    check_unique(found)
    rows = {(row.format, row.variant, row.settings["precision"], row.quantity): row for row in found}
    litert = rows["tflite", envs.LITERT_TORCH, "float32", TIME]
    assert (litert.figure, litert.ratio, litert.reference) == (8.0, 4.0, ec.OURS)
    assert rows["tflite", envs.LITERT_TORCH, "float32", SIZE].ratio == 1
    assert rows["tflite", ec.OURS, "float32", TIME].ratio is None
    assert rows["tflite", ec.OURS, "float32", TIME].details["minimum"] == 1.0
    assert rows["tflite", envs.ONNX2TF, "float32", TIME].note == "ran once"
    assert rows["onnx", envs.ONNXSIM, "float32", MEMORY].figure == 20
    absent = [row for row in found if row.variant == envs.EXECUTORCH]
    assert [(row.quantity, row.figure, row.note) for row in absent] == [(TIME, None, "not installed: no wheel")]
    assert {row.format for row in found if row.quantity == ANSWERS} == {"onnx", "tflite"} < set(RUNNERS)


def test_fusing_has_rows_for_both_files(net: Network, folder: Path) -> None:
    artifact = ec.ARTIFACT["onnxruntime"].target(folder)
    found = {(row.format, row.quantity): row for row in fusing_rows(net, artifact, folder, 2)}
    assert set(found) == {(kind, q) for kind in ("onnx", "tflite") for q in (TIME, "added memory", SIZE)}
    for kind, base in (("onnx", "base.onnx"), ("tflite", "base.tflite")):
        assert found[kind, SIZE].figure == size_of(artifact / base)
        assert 0 < found[kind, TIME].details["compute"] < (found[kind, TIME].figure or 0)
        assert len(found[kind, TIME].details["samples"]) == 2


def test_a_plain_copy_is_what_fusing_is_held_against(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert fusing.copy_only(tmp_path / "a", tmp_path / "b") > 0
    assert (tmp_path / "b").read_bytes() == b"abc"
    assert size_of(tmp_path) == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--models", "resnet18"], "resnet18: expected NAME:PIXELS such as resnet18:128"),
        (["--models", "vgg:32"], "vgg:32: no model vgg: choose from"),
        (["--rounds", "0"], "--rounds counts from 1, got 0"),
        (["--python", "litert=x"], "--python wants NAME=PATH with a name of project, onnxruntime"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(arguments)
    assert text in " ".join(capsys.readouterr().err.split())
