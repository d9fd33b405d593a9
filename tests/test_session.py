"""Whole fine-tuning runs: what they compute, what they leave on disk, how they stop and go on."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_torch
from artifacts import BNS, CLASSES, Arrays, Recipe, Tiny, W, build
from safetensors.numpy import load_file, save_file

from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, CheckpointError, DivergenceError, OutputError
from lorac_runtime.report import FinetuneReport, read_report
from lorac_runtime.session import finetune
from lorac_runtime.training import Progress

IMAGES = 60


def write_data(path: Path, count: int = IMAGES, seed: int = 0) -> Path:
    """Noisy images whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    noise = rng.normal(80, 30, (count, W, W, 3)) + 50 * labels[:, None, None, None]
    np.savez(path, images=np.clip(noise, 0, 255).astype(np.uint8), labels=labels)
    return path


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


def normalised(images: np.ndarray) -> np.ndarray:
    """What the tiny artifact's input spec says, written again."""
    return (images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]


def held_out(report: FinetuneReport, data: Path) -> tuple[np.ndarray, np.ndarray]:
    from lorac_runtime.data import stratified_split

    with np.load(data) as file:
        _, index = stratified_split(file["labels"], report.settings.val_fraction, report.seed)
        return normalised(file["images"][index]), file["labels"][index]


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
    from lorac_runtime.data import stratified_split

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
    assert "no images are held out" in caplog.text


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
    from lorac_runtime.data import stratified_split

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


class StopError(Exception):
    """Raised by a test in mid-run."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return on_progress


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    policy: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy=policy, clip_norm=0.0))
    config = FinetuneConfig(epochs=4, lr=0.01, threads=1)  # 6 steps each
    whole = finetune(tiny.folder, data, tmp_path / "whole", config)
    with pytest.raises(StopError):
        finetune(tiny.folder, data, tmp_path / "out", config, on_progress=stop_at(15))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint"]
    shown: list[Progress] = []
    with caplog.at_level(logging.INFO):
        resumed = finetune(tiny.folder, data, tmp_path / "out", config, on_progress=shown.append)
    assert "resuming after epoch 2 of 4" in caplog.text
    assert [p.step for p in shown] == list(range(13, 25))
    assert resumed.losses == whole.losses
    assert resumed.epoch_losses == whole.epoch_losses
    assert (resumed.accuracy_before, resumed.accuracy_after) == (whole.accuracy_before, whole.accuracy_after)
    for name in ("adapter.safetensors", "fused.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_killed_process_is_resumed_by_the_same_command(tiny: Tiny, data: Path, tmp_path: Path, root: Path) -> None:
    """A real SIGKILL, wherever it strikes after the second epoch."""
    out = tmp_path / "out"
    epochs = 40
    command = [sys.executable, root / "runtime" / "ort_finetune.py", tiny.folder, "--data", data, "--threads", "1"]
    options = ["--epochs", str(epochs), "--lr", "0.005"]
    with subprocess.Popen([*command, *options, "--out", out], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "epoch  2/" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "adapter.safetensors").exists()
    done = subprocess.run([*command, *options, "--out", out, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stderr
    whole = finetune(tiny.folder, data, tmp_path / "whole", FinetuneConfig(epochs=epochs, lr=0.005, threads=1))
    assert tuple(json.loads(done.stdout)["losses"]) == whole.losses
    assert (out / "fused.onnx").read_bytes() == (tmp_path / "whole" / "fused.onnx").read_bytes()


def stopped(tiny: Tiny, data: Path, out: Path, config: FinetuneConfig) -> None:
    with pytest.raises(StopError):
        finetune(tiny.folder, data, out, config, on_progress=stop_at(8))


def test_another_run_does_not_resume_and_says_why(tiny: Tiny, data: Path, out: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(epochs=3, lr=0.01)
    stopped(tiny, data, out, config)
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"(?s)--restart.*epochs: '3' before, '4' now.*lr: '0.01' before"):
        finetune(tiny.folder, data, out, FinetuneConfig(epochs=4, lr=0.02))
    with pytest.raises(CheckpointError, match=r"data: '[0-9a-f]{64}' before"):
        finetune(tiny.folder, write_data(tmp_path / "other.npz", seed=1), out, config)
    other = build(tmp_path / "a", Recipe(seed=1))
    with pytest.raises(CheckpointError, match=r"artifact: '[0-9a-f]{64}' before"):
        finetune(other.folder, data, out, config)
    assert contents(out) == before
    report = finetune(tiny.folder, data, out, FinetuneConfig(epochs=4, restart=True))
    assert len(report.losses) == 4 * 6


def test_threads_may_differ_when_a_run_resumes(tiny: Tiny, data: Path, out: Path) -> None:
    stopped(tiny, data, out, FinetuneConfig(epochs=3, threads=1))
    assert len(finetune(tiny.folder, data, out, FinetuneConfig(epochs=3, threads=2)).losses) == 18


@pytest.mark.parametrize("damage", ["state truncated", "state altered", "resume.json truncated", "resume.json foreign"])
def test_a_damaged_checkpoint_is_refused_and_restart_helps(tiny: Tiny, data: Path, out: Path, damage: str) -> None:
    config = FinetuneConfig(epochs=3)
    stopped(tiny, data, out, config)
    path = out / "checkpoint" / ("resume.json" if "json" in damage else "epoch-1/checkpoint")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replacement = {"state altered": bytes(content), "resume.json foreign": b"[1]"}
    path.write_bytes(replacement.get(damage, path.read_bytes()[:-50]))
    with pytest.raises(CheckpointError, match="--restart"):
        finetune(tiny.folder, data, out, config)
    assert len(finetune(tiny.folder, data, out, dataclasses.replace(config, restart=True)).losses) == 18


def test_a_finished_run_is_not_repeated(tiny: Tiny, data: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = FinetuneConfig(epochs=1)
    report = finetune(tiny.folder, data, out, config)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with caplog.at_level(logging.INFO):
        assert finetune(tiny.folder, data, out, config) == report
    assert "finished" in caplog.text
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(OutputError, match=r"(?s)finished run of another kind.*seed: '0' before, '1' now"):
        finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, seed=1))
    repeated = finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, seed=1, restart=True))
    assert repeated.seed == 1
    (out / "fused.onnx").unlink()  # no longer whole: made again
    assert finetune(tiny.folder, data, out, FinetuneConfig(epochs=1, seed=1)).losses == repeated.losses
    assert (out / "fused.onnx").exists()


def test_a_foreign_report_is_not_overwritten(tiny: Tiny, data: Path, out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text('{"title": "mine"}')
    with pytest.raises(OutputError, match=r"(?s)is not the report of a run.*title: unknown key"):
        finetune(tiny.folder, data, out, FinetuneConfig(epochs=1))
    assert (out / "report.json").read_text() == '{"title": "mine"}'


def test_divergence_leaves_no_result_and_the_last_good_checkpoint(data: Path, out: Path, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(optimizer="sgd", clip_norm=0.0))
    config = FinetuneConfig(epochs=3, lr=1e38, warmup=0.99)
    with pytest.raises(DivergenceError, match=r"No result was written. Begin anew \(--restart\) .* --lr 3e\+37"):
        finetune(tiny.folder, data, out, config)
    assert not [p for p in out.iterdir() if p.name != "checkpoint"]


def test_divergence_in_the_last_step_is_seen_in_the_weights(data: Path, out: Path, tmp_path: Path) -> None:
    """One step per epoch: its loss is that of the good start. The weights, or what they give, betray it."""
    tiny = build(tmp_path / "a", Recipe(optimizer="sgd", clip_norm=0.0))
    for lr, message in ((1e39, "weights are not finite after epoch 1"), (1e30, "the loss is nan after the last step")):
        config = FinetuneConfig(epochs=1, lr=lr, batch_size=100, warmup=1.0, val_fraction=0.0, restart=True)
        with pytest.raises(DivergenceError, match=message):
            finetune(tiny.folder, data, out, config)
        assert not [p for p in out.iterdir() if p.name != "checkpoint"]


def test_a_start_that_is_not_sound_is_refused(tiny: Tiny, data: Path, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    save_file({k: np.full_like(v, 1e30) for k, v in tiny.start.items()}, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="before any training"):
        finetune(tiny.folder, data, out, adapter=path)


def test_a_loss_that_rises_and_a_model_that_gets_worse_are_pointed_out(
    tiny: Tiny, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = finetune(tiny.folder, data, tmp_path / "good", FinetuneConfig(epochs=30, lr=0.02))
    assert good.accuracy_after == 1.0
    assert not caplog.records
    start = tmp_path / "good" / "adapter.safetensors"
    finetune(tiny.folder, data, tmp_path / "bad", FinetuneConfig(epochs=4, lr=1.0, warmup=1.0), adapter=start)
    assert "the loss rose from" in caplog.text
    assert "the model got worse, from 100.0 to" in caplog.text


def test_an_adapter_of_another_model_is_refused_with_all_mismatches(
    tiny: Tiny, data: Path, out: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny.folder / "adapter.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:2].copy()
    del tensors["conv2.lora_a"]
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata | {"model": "other"})
    with pytest.raises(AdapterError) as caught:
        finetune(tiny.folder, data, out, adapter=tmp_path / "x.safetensors")
    for part in ("model", "fc.weight has shape (2, 8)", "conv2.lora_a is missing"):
        assert part in str(caught.value)
    assert list(out.iterdir()) == []


def test_places_that_would_harm_an_input_are_refused(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    for inside in (tiny.folder, tiny.folder / "sub" / ".." / "out"):
        with pytest.raises(OutputError, match="lies in the training artifact"):
            finetune(tiny.folder, data, inside)
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(OutputError, match="lies in the folder of images"):
        finetune(tiny.folder, images, images / "out")
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes((tiny.folder / "adapter.safetensors").read_bytes())
    with pytest.raises(OutputError, match="would overwrite the adapter"):
        finetune(tiny.folder, data, tmp_path, adapter=adapter)
    assert not (tiny.folder / "out").exists()


def test_another_artifact_is_no_output_folder(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", Recipe())
    before = contents(other.folder)
    with pytest.raises(OutputError, match="is a training artifact itself"):
        finetune(tiny.folder, data, other.folder)
    assert contents(other.folder) == before


def test_what_is_not_of_this_program_stays_in_the_output_folder(tiny: Tiny, data: Path, out: Path) -> None:
    kept = {"checkpoint/notes.txt": b"mine", "photo.part": b"mine", "sub/epoch-1/x": b"mine"}
    leftovers = {".fused.onnx.123.part": b"partial", "checkpoint/epoch-9/checkpoint": b"old"}
    for name, content in (kept | leftovers).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    finetune(tiny.folder, data, out, FinetuneConfig(epochs=1))
    found = contents(out)
    assert {name: found[name] for name in kept} == kept
    assert found.keys() == {*kept, "adapter.safetensors", "fused.onnx", "report.json"}


def test_a_full_disk_is_noticed_before_any_work(
    tiny: Tiny, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"has 0 MB of free space, a run needs up to 0 MB|free space"):
        finetune(tiny.folder, data, out)
    usage.free = 1_000_000
    assert finetune(tiny.folder, data, out, FinetuneConfig(epochs=1)).losses


def test_the_space_asked_for_covers_what_a_run_holds(tiny: Tiny, data: Path, out: Path) -> None:
    """Largest sum of file sizes ever seen in the output folder, looked at after each step."""
    from lorac_runtime.outputs import space_needed

    sizes = [0]

    def look(progress: Progress) -> None:
        sizes.append(sum(len(content) for content in contents(out).values()))

    finetune(tiny.folder, data, out, FinetuneConfig(epochs=3), on_progress=look)
    one_checkpoint, results = max(sizes), sum(len(c) for c in contents(out).values())
    assert one_checkpoint + results < space_needed(tiny.manifest) < 10 * (one_checkpoint + results)


FRAMEWORKS = ("torch", "onnx", "onnx_ir", "onnxscript", "h5py", "sympy", "tensorflow", "torchvision")
WATCH = """
import json, sys
from pathlib import Path
from lorac_runtime import FinetuneConfig, finetune
finetune(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), FinetuneConfig(epochs=1))
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[4].split(","):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def in_new_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_whole_run_imports_no_framework_although_they_are_installed(policy: str, data: Path, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy=policy))
    done = in_new_python(WATCH, tiny.folder, data, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"numpy", "onnxruntime", "safetensors"} <= loaded
    assert loaded & set(FRAMEWORKS) == set()
    assert done.stderr == ""  # nor does the native library write its log


def test_a_whole_run_works_where_no_framework_can_be_imported(tiny: Tiny, data: Path, out: Path) -> None:
    done = in_new_python(BLOCK + WATCH, tiny.folder, data, out, ",".join(FRAMEWORKS))
    assert done.returncode == 0, done.stderr
    assert (out / "fused.onnx").exists()


def test_the_blocker_blocks_what_it_is_told_to() -> None:
    for name in ("torch", "onnx"):
        blocked = in_new_python(f"{BLOCK}\nimport {name}", 1, 2, 3, ",".join(FRAMEWORKS))
        assert blocked.returncode == 1
        assert f"{name} is blocked" in blocked.stderr
    free = in_new_python(f"{BLOCK}\nimport onnx", 1, 2, 3, "nothing")
    assert free.returncode == 0, free.stderr
