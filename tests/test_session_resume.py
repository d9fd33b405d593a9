"""Runs that stop, and what the same call does afterwards."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from artifacts import Tiny, build
from finetune_runs import (
    StopError,
    contents,
    stop_at,
    write_data,
)
from tiny_network import Recipe

from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import CheckpointError, OutputError
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
    path = out / "checkpoint/step-6" / ("resume.json" if "json" in damage else "training_state.safetensors")
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
