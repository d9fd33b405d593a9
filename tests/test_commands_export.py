"""`lorac-deploy export`: a file for an app from an artifact, and base.tflite inside of artifacts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_artifacts import SPEC, export

import lorac_exporters.tflite.running
from lorac_deploy.commands.export import main
from lorac_deploy.file_export import export_file
from lorac_exporters.tflite import TfliteConfig
from lorac_exporters.tflite.running import Runner
from lorac_exporters.verify import run_onnx
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.data import preprocess
from lorac_runtime.patch import fuse

COUNT = 40


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 10, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> dict[str, Path]:
    """Artifacts of one network: with a float32 base.tflite, an int8 one, and none."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, choice in (("float32", "auto"), ("int8", "int8"), ("none", "none")):
        export(folder / name, tflite=choice, calibration=images if choice == "int8" else None)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def adapter(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    """What training would leave behind."""
    file = load_adapter(artifacts["float32"] / mf.ADAPTER)
    rng = np.random.default_rng(0)
    tensors = {k: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in file.tensors.items()}
    save_adapter(tmp_path / "trained.safetensors", tensors, file.metadata)
    return tmp_path / "trained.safetensors"


@pytest.fixture
def data(artifacts: dict[str, Path], images: np.ndarray, tmp_path: Path) -> Path:
    """Labelled as the base network answers, but for every fourth image."""
    labels = run_onnx(artifacts["float32"] / mf.BASE, preprocess(images, SPEC)).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return tmp_path / "data.npz"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(preprocess(images, SPEC).transpose(0, 2, 3, 1))


def test_without_an_adapter_a_file_is_the_artifacts_base(
    artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("float32", "tflite"), ("float32", "onnx"), ("int8", "tflite")):
        weights = ("--weights", "int8") if name == "int8" else ()
        report = run(capsys, artifacts[name], "--to", kind, *weights, "--out", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == (artifacts[name] / f"base.{kind}").read_bytes()
        assert report["nbytes"] == (tmp_path / "out").stat().st_size


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8"])
def test_an_adapter_is_fused_into_the_file(
    artifacts: dict[str, Path],
    adapter: Path,
    images: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
) -> None:
    out = tmp_path / "fused.tflite"
    report = run(capsys, artifacts["int8"], "--to", "tflite", "--weights", weights, "--adapter", adapter, "--out", out)
    fuse(artifacts["float32"], tmp_path / "fused.onnx", load_adapter(adapter).tensors)
    expected = run_onnx(tmp_path / "fused.onnx", preprocess(images, SPEC))
    (found,) = Runner(out).run(nhwc(images))
    tolerance = {"float32": 1e-5, "fp16": 5e-3, "int8": 0.1}[weights]
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())
    assert report["tflite"]["weights"] == weights
    base = run_onnx(artifacts["float32"] / mf.BASE, preprocess(images, SPEC))
    assert np.abs(found - base).max() > 2 * np.abs(found - expected).max()


def test_an_onnx_file_with_an_adapter_is_what_fusing_writes(
    artifacts: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, artifacts["none"], "--to", "onnx", "--adapter", adapter, "--out", tmp_path / "out.onnx")
    fuse(artifacts["none"], tmp_path / "fused.onnx", load_adapter(adapter).tensors)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "fused.onnx").read_bytes()


def test_labelled_data_give_the_accuracy_of_the_file_beside_float_onnx(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tflite"
    common = (artifacts["float32"], "--to", "tflite", "--data", data, "--out", out)
    report = run(capsys, *common)
    assert report["images"] == COUNT
    onnx, lite = report["accuracies"]
    assert (onnx["accuracy"], onnx["agreement"], onnx["max_difference"]) == (0.75, 1.0, 0.0)
    assert (lite["accuracy"], lite["agreement"]) == (0.75, 1.0)
    assert 0 < lite["max_difference"] < 1e-5
    rounded = run(capsys, *common, "--weights", "int8", "--calibration", data, "--output-dtype", "int8")
    assert rounded["accuracies"][0] == onnx
    assert rounded["accuracies"][1]["max_difference"] > 1e-3
    assert rounded["accuracies"][1]["agreement"] >= 0.8


def test_an_onnx_file_is_measured_alone(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(capsys, artifacts["none"], "--to", "onnx", "--data", data, "--out", tmp_path / "out.onnx")
    (row,) = report["accuracies"]
    assert (row["file"], row["accuracy"]) == ("float32 ONNX", 0.75)


def test_raw_images_may_be_the_input(
    artifacts: dict[str, Path], images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tflite"
    report = run(capsys, artifacts["float32"], "--to", "tflite", "--input-dtype", "uint8", "--out", out)
    assert report["tflite"]["input_dtype"] == "uint8"
    expected = run_onnx(artifacts["float32"] / mf.BASE, preprocess(images, SPEC))
    np.testing.assert_allclose(Runner(out).run(images)[0], expected, atol=1e-5)


def test_the_table_says_size_operators_and_answers(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tflite"
    assert main([str(artifacts["float32"]), "--to", "tflite", "--data", str(data), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in ("out.tflite", "MB", "2 CONV_2D", "FULLY_CONNECTED", "75.00%", "100.00%", "on 40 images"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--to", "onnx", "--weights", "fp16"], 2, "chosen for TFLite only"),
        (["--to", "onnx", "--calibration", "x.npz"], 2, "calibration data apply to int8 weights"),
        (["--to", "tflite", "--calibration", "x.npz"], 2, "calibration data apply to int8 weights"),
        (["--to", "tflite", "--output-dtype", "int8"], 2, "need weights int8, not float32"),
        (["--to", "coreml"], 2, "invalid choice"),
        (["--to", "tflite", "--weights", "int8"], 1, "give images with --calibration"),
        (["--to", "tflite", "--weights", "int8", "--calibration", "missing.npz"], 1, "missing.npz"),
        (["--to", "tflite", "--data", "missing.npz"], 1, "missing.npz"),
        (["--to", "tflite", "--adapter", "missing.safetensors"], 1, "missing.safetensors not found"),
    ],
)
def test_wrong_arguments_end_with_one_message_and_leave_the_file(
    artifacts: dict[str, Path],
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").write_bytes(b"old")
    try:
        code = main([str(artifacts["float32"]), *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as err:
        code = err.code  # type: ignore[assignment]
    assert code == status
    assert message in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_calibration_images_of_another_size_are_refused(
    artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "c.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.zeros(20, int))
    options = ["--to", "tflite", "--weights", "int8", "--calibration", str(tmp_path / "c.npz")]
    assert main([str(artifacts["float32"]), *options, "--out", str(tmp_path / "out")]) == 1
    assert "expected (N, 10, 10, 3)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base.tflite", "base.onnx", "manifest.json", "adapter.safetensors"])
def test_files_of_the_artifact_are_never_overwritten(
    artifacts: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifacts["float32"] / name).read_bytes()
    (tmp_path / "link").symlink_to(artifacts["float32"] / name)
    for out in (artifacts["float32"] / name, tmp_path / "link"):
        assert main([str(artifacts["float32"]), "--to", "tflite", "--out", str(out)]) == 1
        assert "is a file of the training artifact" in capsys.readouterr().err
    assert (artifacts["float32"] / name).read_bytes() == before


def test_a_damaged_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "artifact")
    content = bytearray((tmp_path / "artifact" / mf.BASE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "artifact" / mf.BASE).write_bytes(content)
    assert main([str(tmp_path / "artifact"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 1
    assert "base.onnx was altered" in capsys.readouterr().err


def test_without_an_interpreter_writing_works_and_measuring_says_what_to_install(
    artifacts: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lorac_exporters.tflite.running, "_RUNTIMES", ("no_such_runtime",))
    out = tmp_path / "out.tflite"
    common = [str(artifacts["float32"]), "--to", "tflite", "--out", str(out)]
    assert main(common) == 0
    out.write_bytes(b"old")
    assert main([*common, "--data", str(data)]) == 1
    assert "pip install 'lorac-deploy[tflite]'" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_the_function_refuses_what_the_command_does(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chosen for TFLite only"):
        export_file(artifacts["none"], tmp_path / "out", to="onnx", config=TfliteConfig())


def test_every_option_of_tflite_changes_the_file(
    artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()
    for fields in ({}, {"weights": "fp16"}, {"weights": "int8"}, {"input_dtype": "uint8"}):
        config = dataclasses.replace(TfliteConfig(), **fields)
        export_file(artifacts["int8"], tmp_path / "out", to="tflite", config=config)
        seen.add((tmp_path / "out").read_bytes())
    for field in ("input_dtype", "output_dtype"):
        config = dataclasses.replace(TfliteConfig("int8"), **{field: "int8"})
        export_file(artifacts["int8"], tmp_path / "out", to="tflite", config=config)
        seen.add((tmp_path / "out").read_bytes())
    assert len(seen) == 6


def test_int8_report_tells_how_much_the_ranges_cut_off(
    artifacts: dict[str, Path], adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = load_adapter(adapter)
    loud = {name: value * 30 if name.endswith("lora_b") else value for name, value in file.tensors.items()}
    save_adapter(tmp_path / "loud.safetensors", loud, file.metadata)
    common = (artifacts["int8"], "--to", "tflite", "--weights", "int8", "--data", data, "--out", tmp_path / "a.tflite")
    calm = dict(run(capsys, *common)["cut_off"])
    wild = dict(run(capsys, *common, "--adapter", tmp_path / "loud.safetensors")["cut_off"])
    assert len(calm) == len(wild) == 3
    assert max(calm.values()) < 0.02  # the images it was calibrated with: the extremes alone
    assert max(wild.values()) > 0.1
    assert list(wild.values()) == sorted(wild.values(), reverse=True)


def test_files_without_int8_activations_report_nothing_cut_off(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "a.tflite"
    assert run(capsys, artifacts["float32"], "--to", "tflite", "--data", data, "--out", out)["cut_off"] == []
