"""Anchors and memory that `export-training-artifact` puts into an artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from exporter_graphs import legacy_export
from small_artifacts import NAMES, SPEC, network

from lorac_deploy.commands.export_training_artifact import main
from lorac_runtime import manifest as mf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    named = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    onnx.save(legacy_export(network(), (1, *SPEC.shape), **named), path)
    return path


def words(model: Path, out: Path) -> list[str]:
    numbers = {"--mean": SPEC.mean, "--std": SPEC.std}
    given = [text for name, values in numbers.items() for text in (name, ",".join(map(str, values)))]
    return ["--onnx", str(model), "--num-classes", "4", "--class-names", ",".join(NAMES), *given, "--out", str(out)]


def test_anchors_are_packed_and_hashed(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 10, 10, 3), np.uint8), np.arange(9) % 4
    np.savez(tmp_path / "few.npz", images=images.transpose(0, 3, 1, 2), labels=labels)
    assert main([*words(model, tmp_path / "a"), "--anchors", str(tmp_path / "few.npz")]) == 0
    manifest = mf.load(tmp_path / "a")
    mf.verify_files(tmp_path / "a", manifest)
    assert mf.ANCHORS in manifest.files
    with np.load(tmp_path / "a" / mf.ANCHORS) as packed:
        assert np.array_equal(packed["images"], images)  # channels last, however they were given
        assert np.array_equal(packed["labels"], labels)
    again = tmp_path / "b"
    assert main([*words(model, again), "--anchors", str(tmp_path / "few.npz")]) == 0
    assert (again / mf.FILE_NAME).read_bytes() == (tmp_path / "a" / mf.FILE_NAME).read_bytes()  # no time stamps in it


def test_anchors_need_labels_and_the_right_size(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((9, 11, 10, 3), np.uint8), labels=np.arange(9) % 4)
    assert main([*words(model, tmp_path / "a"), "--anchors", str(tmp_path / "few.npz")]) == 1
    assert "have shape (9, 11, 10, 3)" in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", images=np.zeros((9, 10, 10, 3), np.uint8))
    assert main([*words(model, tmp_path / "a"), "--anchors", str(tmp_path / "few.npz")]) == 1
    assert "has no labels" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
