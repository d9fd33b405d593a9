"""Files of segmentation networks for apps: calibrated with images alone, and measured by pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from task_networks import CLASSES, SPEC, export, unet

from lorac_deploy.cli import main
from lorac_deploy.file_export import export_file
from lorac_exporters.task_config import TaskConfig
from lorac_exporters.tflite import TfliteConfig
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, DataError
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.tasks import IGNORED

COUNT = 70  # two batches


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seg") / "artifact"
    export(folder, unet(), TaskConfig("segmentation"), TrainingDefaults(), classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and masks of which a tenth of the pixels has no label."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "masks.npz"
    channels, height, width = SPEC.shape
    masks = rng.integers(0, CLASSES, (COUNT, height, width))
    masks[rng.random(masks.shape) < 0.1] = IGNORED
    images = rng.integers(0, 256, (COUNT, height, width, channels), dtype=np.uint8)
    np.savez(path, images=images, labels=masks.astype(np.uint8))
    return path


def guesses(artifact: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(artifact / "base.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {SPEC.name: preprocess(images, SPEC)})[0].argmax(1)


def test_the_report_counts_labelled_pixels(
    artifact: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(artifact), "--to", "tflite", "--data", str(data), "--out", str(tmp_path / "a.tflite")]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    onnx, tflite = report["accuracies"]
    arrays = np.load(data)
    answers, masks = guesses(artifact, arrays["images"]), arrays["labels"]
    expected = np.mean(answers[masks != IGNORED] == masks[masks != IGNORED])
    assert (onnx["accuracy"], onnx["agreement"], report["by_pixel"]) == (pytest.approx(expected), 1.0, True)
    assert tflite["accuracy"] == pytest.approx(expected, abs=1e-3)
    assert tflite["agreement"] > 0.999
    assert tflite["max_difference"] < 1e-4
    assert main(command) == 0
    assert f"on {COUNT} images, by pixel" in capsys.readouterr().out


def test_images_without_masks_calibrate_int8(artifact: Path, data: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.load(data)["images"])
    out = tmp_path / "a.tflite"
    report = export_file(
        artifact, out, to="tflite", config=TfliteConfig("int8"), calibration=tmp_path / "images.npz", data=data
    )
    onnx, int8 = report.accuracies
    assert 0.9 < int8.agreement < 1
    assert abs(int8.accuracy - onnx.accuracy) < 0.05
    assert 1e-4 < int8.max_difference < 0.2
    with pytest.raises(DataError, match="labels"):
        export_file(artifact, out, to="tflite", data=tmp_path / "images.npz")


def test_numbers_have_no_class_to_compare(data: Path, tmp_path: Path) -> None:
    export(tmp_path / "artifact", unet(2), TaskConfig("regression"), TrainingDefaults(loss="l1"))
    with pytest.raises(ArtifactError, match=r"the task is regression.*leave the data out"):
        export_file(tmp_path / "artifact", tmp_path / "a.tflite", to="tflite", data=data)
    assert not (tmp_path / "a.tflite").exists()
