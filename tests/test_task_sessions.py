"""Whole runs of other tasks on a device: figures, pieces, checkpoints, features, files, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from task_networks import CLASSES, SPEC, export, unet

from lorac_exporters.task_config import TaskConfig
from lorac_exporters.verify import run_onnx, verify
from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, EngineError, StoppedError
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.session import finetune
from lorac_runtime.tables import table
from lorac_runtime.tasks import IGNORED

ADAMW = TrainingDefaults(lr=0.02, batch_size=4, epochs=6)
CONFIG = FinetuneConfig(val_fraction=0.25, threads=1)


def scenes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground, a bright band and a dark one, and where they are; the first rows have no label."""
    rng = np.random.default_rng(3)
    images, masks = np.full((count, 12, 12, 3), 110, np.int64), np.zeros((count, 12, 12), np.int64)
    for image, mask in zip(images, masks, strict=True):
        for label, brightness in ((1, 230), (2, 20)):
            start = rng.integers(0, 8)
            rows = slice(start, start + 4)
            image[rows], mask[rows] = brightness, label
    for number, mask in enumerate(masks):
        mask[: 1 + number % 5] = IGNORED  # more in one image than in another
    return np.clip(images + rng.integers(-20, 20, images.shape), 0, 255).astype(np.uint8), masks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, masks = scenes(24)
    path = tmp_path_factory.mktemp("data") / "masks.npz"
    np.savez(path, images=images, labels=masks, targets=images.mean((1, 2), dtype=np.float32)[:, :2] / 255)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet") / "artifact"
    export(folder, unet(), TaskConfig("segmentation"), ADAMW, classes=CLASSES)
    return folder


def test_segmentation_is_learned_and_fused(artifact: Path, data: Path, tmp_path: Path) -> None:
    report = finetune(artifact, data, tmp_path / "out", dataclasses.replace(CONFIG, to=("onnx", "tflite")))
    assert report.task == "segmentation"
    assert report.mean_iou_before is not None
    assert report.mean_iou_after is not None
    assert report.mean_iou_after > report.mean_iou_before + 0.2
    images, masks = scenes(24)
    scores = run_onnx(tmp_path / "out" / "fused.onnx", preprocess(images, SPEC))
    kept = masks != IGNORED
    assert (scores.argmax(1) == masks)[kept].mean() > 0.7
    for name in ("onnx", "tflite"):
        found = verify(artifact / f"base.{name}", tmp_path / "out" / f"fused.{name}")
        assert found.ok, found
    text = table(report, tmp_path / "out")
    assert f"mean IoU  {report.mean_iou_before:.3f} before, {report.mean_iou_after:.3f} after, on 6 held-out" in text


def test_pieces_of_a_batch_and_a_checkpoint_change_nothing(artifact: Path, data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=2)
    whole = finetune(artifact, data, tmp_path / "whole", config)
    pieces = finetune(artifact, data, tmp_path / "pieces", dataclasses.replace(config, micro_batch=3))
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)
    assert pieces.loss_after == pytest.approx(whole.loss_after, rel=1e-5)
    stopping = dataclasses.replace(config, time_budget=0.0, checkpoint_every=0.0)
    stops = 0
    while True:
        try:
            resumed = finetune(artifact, data, tmp_path / "resumed", stopping)
        except StoppedError:
            stops += 1
        else:
            break
    assert stops > 2
    assert resumed.losses == whole.losses
    assert (tmp_path / "resumed" / "fused.onnx").read_bytes() == (tmp_path / "whole" / "fused.onnx").read_bytes()


def test_what_the_base_answers_is_a_feature_that_a_cache_keeps(data: Path, tmp_path: Path) -> None:
    training = dataclasses.replace(ADAMW, loss="distillation", epochs=2)
    manifest = export(tmp_path / "a", unet(), TaskConfig("segmentation"), training, classes=CLASSES)
    assert [f.shape for f in manifest.features if f.name != "features.input"] == [(CLASSES, 12, 12)]
    plain = finetune(tmp_path / "a", data, tmp_path / "plain", CONFIG)
    kept = finetune(tmp_path / "a", data, tmp_path / "kept", dataclasses.replace(CONFIG, cache=1 << 24))
    assert kept.losses == plain.losses
    assert kept.cache is not None
    assert kept.cache.hit_rate == 0.5  # every sample once, and then never again
    own = finetune(tmp_path / "a", data, tmp_path / "own", dataclasses.replace(CONFIG, micro_batch=2))
    assert own.losses == pytest.approx(plain.losses, rel=1e-5)


def test_regression_reports_its_error(data: Path, tmp_path: Path) -> None:
    from torch import nn

    net = nn.Sequential(unet(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    manifest = export(tmp_path / "a", net, TaskConfig("regression"), dataclasses.replace(ADAMW, loss="l1"))
    assert manifest.task is not None
    assert manifest.task.targets[0].shape == (2,)
    assert "3.weight" in {t.name for t in manifest.trainables}
    report = finetune(tmp_path / "a", data, tmp_path / "out", CONFIG)
    assert report.error_before is not None
    assert report.error_after is not None
    assert report.error_after < report.error_before / 2
    assert report.error_after == pytest.approx(report.loss_after, rel=1e-5)
    assert "mean absolute, on 6 held-out samples" in table(report, tmp_path / "out")


def test_the_gate_is_for_classifiers_and_leaves_nothing_behind(artifact: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"the task is segmentation.*leave --keep-if-better out"):
        adapt(artifact, data, tmp_path / "state")
    assert not [path for path in (tmp_path / "state").rglob("*") if path.name != ".lock"]


def test_a_loss_graph_is_not_computed_in_pieces(artifact: Path, data: Path, tmp_path: Path) -> None:
    from lorac_runtime.engines import open_engine
    from lorac_runtime.manifest import load

    manifest = load(artifact)
    assert manifest.task is not None
    own = dataclasses.replace(manifest, task=dataclasses.replace(manifest.task, kind="custom"))
    with pytest.raises(EngineError, match="micro-batches do not go with a loss graph"):
        open_engine(artifact, own, engine="onnxruntime", threads=1, micro_batch=2)
