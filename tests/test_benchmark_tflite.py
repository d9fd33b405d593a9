"""The latency benchmark of .tflite files: the same work everywhere, every file timed, wrong files noticed."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import interpreters as envs
from benchmarks import tflite
from benchmarks.step_protocol import Job
from benchmarks.tflite_files import network, our_files

ENVIRONMENTS = [envs.ROOT / ".envs" / name / "bin" / "python" for name in tflite.RUNTIMES.values()]
pytestmark = pytest.mark.skipif(not all(p.exists() for p in ENVIRONMENTS), reason="needs `make tflite-env`")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a short run without other converters writes."""
    out = tmp_path_factory.mktemp("report") / "tflite.json"
    short = ["--pairs", "3", "--rounds", "1", "--converters"]
    assert tflite.main(["--models", "resnet20:16", "--out", str(out), *short]) == 0
    return json.loads(out.read_text())


def test_base_and_fused_are_timed_on_both_runtimes(report: dict):
    found = {(row["runtime"], row["file"]) for row in report["rows"]}
    assert found == {(runtime, file) for runtime in tflite.RUNTIMES for file in ("base", "fused")}
    assert all(0 < row["minimum"] <= row["median"] for row in report["rows"])


def test_fused_is_compared_with_base_and_base_with_nothing(report: dict):
    for row in report["rows"]:
        assert (row["against_base"] is None) == (row["file"] == "base")
    assert {row["against_base"]["rounds"] for row in report["rows"] if row["against_base"]} == {3}


def test_examples_in_docstrings_hold():
    tried = doctest.testmod(tflite)
    assert (tried.attempted >= 3, tried.failed) == (True, 0)


def test_each_runtime_says_what_it_runs_on(report: dict):
    made = report["made"]["resnet20:16"]
    assert made["tflite-runtime"]["packages"]["tflite-runtime"] == "2.14.0"
    assert "ai-edge-litert" in made["ai-edge-litert"]["packages"]


def test_what_making_the_files_took_is_reported(report: dict):
    assert set(report["made"]["resnet20:16"]["ours"]) == {"convert", "fuse compute", "fuse"}


def test_a_file_of_other_answers_is_noticed(tmp_path: Path):
    files, _ = our_files(network("resnet20", 16), tmp_path)
    np.savez(tmp_path / "batch.npz", images=np.ones((1, 16, 16, 3), np.float32), labels=np.zeros(1, np.int64))
    job = Job("", str(tmp_path / "batch.npz"), 1, {})
    others = {"base": files["base"], "onnx2tf": files["fused"], "litert-torch": files["base"]}
    assert tflite.disagreeing(others, job, ENVIRONMENTS[0]) == ["onnx2tf"]


def test_a_missing_environment_names_what_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(envs, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="make tflite-env"):
        envs.python(envs.LITERT, {})
    with pytest.raises(FileNotFoundError, match="python -m benchmarks setup"):
        envs.python(envs.ONNX2TF, {})
