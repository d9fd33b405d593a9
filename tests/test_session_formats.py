"""A run that writes fused.onnx and fused.tflite, one of them, or the other one afterwards."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import StopError, contents, stop_at
from small_artifacts import SPEC, export, network

from lorac_exporters.tflite.running import Runner
from lorac_runtime import cli
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError
from lorac_runtime.outputs import space_needed
from lorac_runtime.patch import fuse
from lorac_runtime.report import read_report
from lorac_runtime.session import finetune

BOTH = ("onnx", "tflite")
CONFIG = FinetuneConfig(epochs=2, batch_size=8, engine="onnxruntime", threads=1)


def to(*formats: str, **changes: object) -> FinetuneConfig:
    return dataclasses.replace(CONFIG, to=formats, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "artifact"
    export(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 4
    images = np.clip(rng.normal(60, 30, (24, 10, 10, 3)) + 45 * labels[:, None, None, None], 0, 255)
    path = tmp_path_factory.mktemp("data") / "local.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="module")
def finished(artifact: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both files. Read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finetune(artifact, data, out, to(*BOTH))
    return out


def test_both_files_are_written_and_reported(artifact: Path, finished: Path) -> None:
    assert sorted(contents(finished)) == ["adapter.safetensors", "fused.onnx", "fused.tflite", "report.json"]
    files = json.loads((finished / "report.json").read_text())["fused"]
    assert [f["name"] for f in files] == ["fused.onnx", "fused.tflite"]
    for file in files:
        assert file["nbytes"] == (finished / file["name"]).stat().st_size
        assert 0 < file["compute_seconds"] < file["seconds"]
        assert (file["overflowed"], file["saturated"]) == (0, [])
    report = read_report(finished)
    assert report is not None
    assert report.fuse_seconds == sum(f["compute_seconds"] for f in files)
    state = load_adapter(finished / "adapter.safetensors").tensors
    for name, base in (("fused.onnx", mf.BASE), ("fused.tflite", mf.BASE_TFLITE)):
        fuse(artifact, finished.parent / name, state, base=base)
        assert (finished.parent / name).read_bytes() == (finished / name).read_bytes()


def test_both_files_answer_alike_and_not_like_the_base(artifact: Path, finished: Path) -> None:
    from lorac_exporters.verify import random_inputs, run_onnx

    images = random_inputs(SPEC, 3, seed=0)
    expected = run_onnx(finished / "fused.onnx", images)
    (found,) = Runner(finished / "fused.tflite").run(images.transpose(0, 2, 3, 1).copy())
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
    assert np.abs(expected - run_onnx(artifact / mf.BASE, images)).max() > 1e-3


@pytest.mark.parametrize("first", BOTH)
def test_a_format_asked_for_later_is_made_without_training_again(
    first: str, artifact: Path, data: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    before = finetune(artifact, data, out, to(first))
    assert sorted(contents(out)) == sorted(["adapter.safetensors", f"fused.{first}", "report.json"])
    steps: list[object] = []
    with caplog.at_level(logging.INFO):
        after = finetune(artifact, data, out, to(*BOTH), on_progress=steps.append)
    assert steps == []
    other = next(name for name in BOTH if name != first)
    assert f"made from it: fused.{other}" in caplog.text
    assert dataclasses.replace(after, fused=before.fused) == before
    assert [f.name for f in after.fused] == [f"fused.{first}", f"fused.{other}"]
    assert read_report(out) == after
    for name in ("adapter.safetensors", "fused.onnx", "fused.tflite"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert finetune(artifact, data, out, to(other)) == after  # nothing is taken away, nothing made


def test_a_lost_file_of_a_finished_run_is_made_again(artifact: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(artifact, data, out, to("tflite"))
    kept = contents(out)
    (out / "fused.tflite").unlink()
    finetune(artifact, data, out, to("tflite"), on_progress=stop_at(1))
    assert (out / "fused.tflite").read_bytes() == kept["fused.tflite"]


def test_another_adapter_in_a_finished_folder_is_not_fused(artifact: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(artifact, data, out, to("onnx"))
    other = tmp_path / "other"
    export(other, network(width=12))
    (out / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"is not the adapter of this run; restart \(--restart\)"):
        finetune(artifact, data, out, to(*BOTH))
    assert not (out / "fused.tflite").exists()


def test_a_new_run_leaves_no_file_of_an_old_adapter(artifact: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(artifact, data, out, to("tflite"))
    (out / ".fused.tflite.123.part").write_bytes(b"left by a run that was killed")
    finetune(artifact, data, out, to("onnx", seed=1, restart=True))
    assert sorted(contents(out)) == ["adapter.safetensors", "fused.onnx", "report.json"]


def test_a_file_that_the_report_does_not_list_is_not_taken_for_this_runs(
    artifact: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finetune(artifact, data, out, to("onnx"))
    (out / "fused.tflite").write_bytes(b"somebody else's")
    finetune(artifact, data, out, to(*BOTH))
    assert (out / "fused.tflite").read_bytes() == (finished / "fused.tflite").read_bytes()


def test_a_report_from_before_there_were_formats_counts_for_onnx(artifact: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(artifact, data, out, to("onnx"))
    raw = json.loads((out / "report.json").read_text())
    del raw["fused"]
    (out / "report.json").write_text(json.dumps(raw))
    before = contents(out)
    assert finetune(artifact, data, out, to("onnx")).fused == ()
    assert contents(out) == before
    assert [f.name for f in finetune(artifact, data, out, to("tflite")).fused] == ["fused.tflite"]


def test_a_stopped_run_may_end_with_another_format(artifact: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        finetune(artifact, data, out, to("onnx"), on_progress=stop_at(4))
    finetune(artifact, data, out, to("tflite"))
    assert sorted(contents(out)) == ["adapter.safetensors", "fused.tflite", "report.json"]
    assert (out / "fused.tflite").read_bytes() == (finished / "fused.tflite").read_bytes()


def test_an_artifact_without_base_tflite_refuses_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    export(tmp_path / "artifact", tflite="none")
    with pytest.raises(ArtifactError, match=r"has no base.tflite to fuse into, it has base.onnx; export"):
        finetune(tmp_path / "artifact", data, tmp_path / "out", to(*BOTH), on_progress=stop_at(1))
    assert not (tmp_path / "out").exists()


def test_room_is_needed_for_every_file(
    artifact: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = mf.load(artifact)
    one, both = space_needed(manifest, ("onnx",)), space_needed(manifest, BOTH)
    assert both - one == manifest.files[mf.BASE_TFLITE].nbytes
    assert space_needed(manifest) == one
    usage = type("Usage", (), {"free": both - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="free space"):
        finetune(artifact, data, tmp_path / "out", to(*BOTH))
    finetune(artifact, data, tmp_path / "out", to("onnx"))


def test_the_command_writes_what_it_is_asked_for(
    artifact: Path, data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(artifact), "--data", str(data), "--out", str(tmp_path / "out"), "--quiet", "--threads", "1"]
    options = ["--epochs", "2", "--batch-size", "8", "--engine", "onnxruntime"]
    assert cli.main([*line, *options, "--to", "onnx, tflite"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'fused.onnx'}, {tmp_path / 'out' / 'fused.tflite'}" in out
    assert (tmp_path / "out" / "fused.tflite").read_bytes() == (finished / "fused.tflite").read_bytes()


@pytest.mark.parametrize("given", ["", "tf", "onnx,", "onnx,onnx", "ONNX", "onnx;tflite"])
def test_formats_that_there_are_not_are_a_wrong_command_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["artifact", "--data", "d.npz", "--out", "out", "--to", given])
    assert caught.value.code == 2
    assert f"to must name some of onnx, tflite, each once, got '{given}'" in capsys.readouterr().err
