"""Whole fine-tuning runs: what they compute and report."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_torch
from artifacts import Tiny, build
from finetune_runs import (
    IMAGES,
    contents,
    held_out,
    normalised,
    run_onnx,
    write_data,
)
from safetensors.numpy import save_file
from tiny_network import BNS, Arrays, Recipe

from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import stratified_split
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError
from lorac_runtime.report import read_report
from lorac_runtime.session import finetune
from lorac_runtime.training import Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Without clipping, so that runs repeat to the last bit (see the engine's tests)."""
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - chosen))


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_the_fused_file_has_the_accuracy_and_the_numbers_of_the_trained_model(
    policy: str, data: Path, out: Path, tmp_path: Path
) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy=policy))
    before = contents(tiny.folder)
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=8, lr=0.02))
    images, labels = held_out(report, data)
    logits = run_onnx(out / "fused.onnx", images)
    engine = open_engine(tiny.folder, tiny.manifest, threads=1)
    engine.load_state(load_adapter(out / "adapter.safetensors").tensors)
    unfused = engine.eval_step(images, labels)[1]
    assert np.abs(logits - unfused).max() < 1e-5 * max(1.0, np.abs(unfused).max())
    assert report.accuracy_after == np.mean(logits.argmax(1) == labels)
    base = run_onnx(tiny.folder / "base.onnx", images)
    assert report.accuracy_before == np.mean(base.argmax(1) == labels)
    assert report.loss_after == pytest.approx(cross_entropy(logits, labels), rel=1e-4, abs=1e-6)
    assert report.loss_before == pytest.approx(cross_entropy(base, labels), rel=1e-4)
    assert np.abs(logits - base).max() > 0.1
    assert report.epoch_losses[-1] < 0.7 * report.epoch_losses[0]
    assert report.accuracy_after > report.accuracy_before
    assert contents(tiny.folder) == before
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "fused.onnx", "report.json"]


def expected_lr(step: int, total: int, peak: float, warmup: float) -> float:
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (1 + math.cos(math.pi * (step - rising + 1) / (total - rising + 1))) / 2


def test_every_step_is_the_one_that_seed_and_schedule_say(tiny: Tiny, data: Path, out: Path) -> None:
    config = FinetuneConfig(epochs=2, batch_size=10, lr=0.01, warmup=0.25, seed=3, val_fraction=0.25, threads=1)
    shown: list[Progress] = []
    report = finetune(tiny.folder, data, out, config, on_progress=shown.append)
    engine = open_engine(tiny.folder, tiny.manifest, threads=1)
    with np.load(data) as file:
        index, _ = stratified_split(file["labels"], 0.25, 3)
        images, labels = normalised(file["images"][index]), file["labels"][index]
    losses = []
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(45)
        for start in range(0, 45, 10):  # the fifth batch of each epoch has 5 images
            part = order[start : start + 10]
            losses.append(engine.train_step(images[part], labels[part], expected_lr(len(losses), 10, 0.01, 0.25)))
    assert list(report.losses) == pytest.approx(losses, rel=1e-6)
    assert report.epoch_losses == pytest.approx((np.mean(losses[:5]), np.mean(losses[5:])))
    saved = load_adapter(out / "adapter.safetensors").tensors
    assert all(np.allclose(saved[k], v, rtol=1e-5, atol=1e-6) for k, v in engine.state().items())
    assert [p.lr for p in shown] == pytest.approx([expected_lr(s, 10, 0.01, 0.25) for s in range(10)])
    assert [(p.epoch, p.step) for p in shown if p.epoch_done] == [(1, 5), (2, 10)]


def test_the_report_tells_what_happened(tiny: Tiny, data: Path, out: Path) -> None:
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=2, seed=7))
    assert read_report(out) == report
    raw = json.loads((out / "report.json").read_text())
    assert (raw["engine"], raw["method"], raw["seed"]) == ("onnxruntime-training", "lora-c", 7)
    assert (raw["train_images"], raw["val_images"], len(raw["losses"])) == (48, 12, 12)
    assert raw["settings"] == {
        "epochs": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0.3, "val_fraction": 0.2, "seed": 7,
    }  # fmt: skip
    assert raw["trained_parameters"] == sum(v.size for v in tiny.start.values())
    assert 20e6 < raw["peak_memory_bytes"] < 64e9
    assert 0 < raw["step_seconds"] <= raw["seconds"] < 60
    assert raw["fuse_seconds"] > 0
    assert raw["versions"]["onnxruntime-training"] == "1.19.2"
    assert raw["versions"]["numpy"] == np.__version__
    metadata = load_adapter(out / "adapter.safetensors").metadata
    assert metadata["base_sha256"] == tiny.manifest.files["base.onnx"].sha256
    assert (metadata["coordinates"], metadata["r"]) == ("folded", "2")


BASELINE = FinetuneConfig(epochs=2, batch_size=8, lr=1e-3, warmup=0.5, val_fraction=0.2, seed=0, threads=1)


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"batch_size": 12}, {"lr": 2e-3}, {"warmup": 0.1}, {"val_fraction": 0.4}, {"seed": 1}]
)
def test_every_setting_changes_the_run_and_the_same_settings_repeat_it(
    tiny: Tiny, data: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    first, again, other = (
        finetune(tiny.folder, data, tmp_path / name, config).losses
        for name, config in (
            ("a", BASELINE), ("b", BASELINE), ("c", dataclasses.replace(BASELINE, **change)),
        )
    )  # fmt: skip
    assert first == again
    assert first != other


def test_without_held_out_images_there_are_no_accuracies(
    tiny: Tiny, data: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, val_fraction=0.0))
    assert (report.accuracy_before, report.accuracy_after) == (None, None)
    assert (report.train_images, report.val_images) == (IMAGES, 0)
    assert json.loads((out / "report.json").read_text())["accuracy_after"] is None
    assert "no samples are held out" in caplog.text


@pytest.mark.parametrize(("policy", "steps"), [("frozen", 5), ("batch", 4)])
def test_a_last_single_image_trains_alone_or_with_the_batch_before_it(policy: str, steps: int, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy=policy))
    data = write_data(tmp_path / "local.npz", count=33)
    config = FinetuneConfig(epochs=1, batch_size=8, val_fraction=0.0)
    assert len(finetune(tiny.folder, data, tmp_path / "out", config).losses) == steps


def test_a_cloud_adapter_is_where_the_run_starts(tiny: Tiny, data: Path, out: Path, tmp_path: Path) -> None:
    """Unfolded coordinates, as PyTorch saves them; the oracle is the unfolded network in PyTorch."""
    rng = np.random.default_rng(0)
    unfolded: Arrays = {k: rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in tiny.start.items()}
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    path = tmp_path / "cloud.safetensors"
    save_file(unfolded, path, metadata={**metadata, "coordinates": "unfolded", "base_sha256": ""})
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, lr=1e-9), adapter=path)
    images, labels = held_out(report, data)
    oracle = tiny_torch.logits(tiny_torch.tensors(tiny.unfolded | unfolded, {}), images, bn="eval").numpy()
    fused = run_onnx(out / "fused.onnx", images)
    assert np.abs(fused - oracle).max() < 1e-4 * max(1.0, np.abs(oracle).max())
    assert report.accuracy_before == np.mean(oracle.argmax(1) == labels)
    assert np.abs(fused - run_onnx(tiny.folder / "base.onnx", images)).max() > 0.1


def test_statistics_of_a_cloud_adapter_refold_the_base(data: Path, out: Path, tmp_path: Path) -> None:
    """Policy `batch`: gamma, beta and running statistics travel in the adapter file."""
    tiny = build(tmp_path / "a", Recipe(bn_policy="batch", momentum=0.0))
    rng = np.random.default_rng(1)
    changed = {f"{bn}.{x}": rng.uniform(0.5, 2, c).astype(np.float32) for bn, (_, c, _) in BNS.items()
               for x in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    path = tmp_path / "cloud.safetensors"
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    save_file(tiny.start | changed, path, metadata={**metadata, "base_sha256": ""})
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, lr=1e-9), adapter=path)
    images, _ = held_out(report, data)
    oracle = tiny_torch.logits(tiny_torch.tensors(tiny.unfolded | tiny.start | changed, {}), images, bn="eval")
    fused = run_onnx(out / "fused.onnx", images)
    assert np.abs(fused - oracle.numpy()).max() < 1e-4 * max(1.0, np.abs(fused).max())


def test_recalibration_does_not_start_from_another_adapter(data: Path, out: Path, tmp_path: Path) -> None:
    """Its statistics are estimated on the base alone, so they would not fit."""
    tiny = build(tmp_path / "a", Recipe(bn_policy="recalibrate"))
    with pytest.raises(AdapterError, match="re-estimates the statistics of its base"):
        finetune(tiny.folder, data, out, adapter=tiny.folder / "adapter.safetensors")


def test_recalibration_uses_the_training_images_only(data: Path, out: Path, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy="recalibrate"))
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, batch_size=16))
    with np.load(data) as file:
        index, _ = stratified_split(file["labels"], 0.2, 0)
        images = normalised(file["images"][index])
    oracle = tiny_torch.tensors(tiny.unfolded, {})
    for count, start in enumerate(range(0, 48, 16), start=1):
        tiny_torch.logits(oracle, images[start : start + 16], bn="train", momentum=1 / count)
    saved = load_adapter(out / "adapter.safetensors").tensors
    assert all(np.allclose(saved[k], oracle[k].numpy(), rtol=1e-4) for k in saved if "running" in k)
    assert "bn2.running_var" in saved
    assert report.accuracy_before is not None
