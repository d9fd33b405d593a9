"""Whole fine-tuning runs with the engine ``onnxruntime``, on step graphs written by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import Run, arrays, runner
from engine_cases import distance
from finetune_runs import StopError, contents, held_out, run_onnx, stop_at, write_data
from hand_steps import StepRecipe
from safetensors.numpy import load_file
from step_artifacts import StepArtifact, add_training_files, build_steps

from lorac_runtime import resume, session
from lorac_runtime.config import FinetuneConfig, Settings
from lorac_runtime.engines import Engine
from lorac_runtime.engines.training_state import FILE_NAME
from lorac_runtime.errors import ArtifactError, DivergenceError, EngineError, OutputError
from lorac_runtime.session import finetune
from lorac_runtime.training import History, Samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> StepArtifact:
    return add_training_files(build_steps(tmp_path_factory.mktemp("both") / "a", StepRecipe(clip_norm=1.0)))


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_the_fused_file_has_the_accuracy_and_the_numbers_of_the_trained_model(
    policy: str, data: Path, tmp_path: Path
) -> None:
    artifact, out = build_steps(tmp_path / "a", StepRecipe(bn_policy=policy)), tmp_path / "out"
    before = contents(artifact.folder)
    report = finetune(artifact.folder, data, out, FinetuneConfig(epochs=8, lr=0.05))
    assert (report.engine, report.versions["onnxruntime"]) == ("onnxruntime", "1.19.2")
    images, labels = held_out(report, data)
    logits = run_onnx(out / "fused.onnx", images)
    assert report.accuracy_after == np.mean(logits.argmax(1) == labels)
    assert report.accuracy_after > report.accuracy_before
    assert report.epoch_losses[-1] < 0.7 * report.epoch_losses[0]
    assert contents(artifact.folder) == before
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "fused.onnx", "report.json"]


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(policy: str, data: Path, tmp_path: Path) -> None:
    artifact = build_steps(tmp_path / "a", StepRecipe(bn_policy=policy, clip_norm=0.1))
    config = FinetuneConfig(epochs=4, lr=0.01, threads=1)  # 6 steps each
    whole = finetune(artifact.folder, data, tmp_path / "whole", config)
    with pytest.raises(StopError):
        finetune(artifact.folder, data, tmp_path / "out", config, on_progress=stop_at(15))
    assert resume.exists(tmp_path / "out")
    resumed = finetune(artifact.folder, data, tmp_path / "out", config)
    assert resumed.losses == whole.losses
    for name in ("adapter.safetensors", "fused.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("first", "second"), [("onnxruntime", "onnxruntime-training"), ("onnxruntime-training", "onnxruntime")]
)
def test_another_engine_may_go_on_with_a_stopped_run(
    both: StepArtifact, data: Path, tmp_path: Path, first: str, second: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = finetune(both.folder, data, tmp_path / "whole", FinetuneConfig(epochs=4, engine=first))
    out = tmp_path / "out"
    with pytest.raises(StopError):
        finetune(both.folder, data, out, FinetuneConfig(epochs=4, engine=first), on_progress=stop_at(15))
    with caplog.at_level(logging.INFO):
        resumed = finetune(both.folder, data, out, FinetuneConfig(epochs=4, engine=second))
    assert f"the engine {second} goes on from a checkpoint of {first}" in caplog.text
    assert resumed.engine == second
    assert resumed.losses[:12] == whole.losses[:12]
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_finished_run_counts_for_any_engine_unless_one_is_asked_for(
    both: StepArtifact, data: Path, tmp_path: Path
) -> None:
    report = finetune(both.folder, data, tmp_path, FinetuneConfig(epochs=1, engine="onnxruntime-training"))
    assert finetune(both.folder, data, tmp_path, FinetuneConfig(epochs=1)) == report
    with pytest.raises(OutputError, match="engine: 'onnxruntime-training' before, 'onnxruntime' now"):
        finetune(both.folder, data, tmp_path, FinetuneConfig(epochs=1, engine="onnxruntime"))
    again = finetune(both.folder, data, tmp_path, FinetuneConfig(epochs=1, restart=True))
    assert again.engine == "onnxruntime"


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_divergence_keeps_the_last_good_checkpoint_and_says_so(
    data: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    """The rate of the last epochs is beyond all bounds, that of the first is not."""
    artifact = build_steps(tmp_path / "a", StepRecipe(optimizer="sgd"))
    config = FinetuneConfig(epochs=3, lr=1e38, warmup=0.99, micro_batch=micro_batch)
    with pytest.raises(DivergenceError, match=r"No result was written. Begin anew \(--restart\) .* --lr 3e\+37"):
        finetune(artifact.folder, data, tmp_path / "out", config)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name != "checkpoint"]


def test_divergence_after_a_good_epoch_leaves_its_checkpoint_whole(data: Path, tmp_path: Path) -> None:
    artifact, out = build_steps(tmp_path / "a", StepRecipe()), tmp_path / "out"
    original = session.train_epoch

    def spoiled(engine: Engine, samples: Samples, settings: Settings, history: History, **more: Any) -> History:
        if history.epoch == 1:
            state = engine.state()
            engine.load_state(state | {"fc.bias": np.full_like(state["fc.bias"], np.nan)})
        return original(engine, samples, settings, history, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "train_epoch", spoiled)
        with pytest.raises(DivergenceError, match="the loss became nan in step 7 of 18"):
            finetune(artifact.folder, data, out, FinetuneConfig(epochs=3))
    kept = load_file(out / "checkpoint" / "step-6" / FILE_NAME)
    assert all(np.all(np.isfinite(v)) for v in kept.values())
    assert kept["step"] == 6
    assert len(finetune(artifact.folder, data, out, FinetuneConfig(epochs=3)).losses) == 18


def test_micro_batches_give_the_same_run_to_rounding(both: StepArtifact, data: Path, tmp_path: Path) -> None:
    whole = finetune(both.folder, data, tmp_path / "whole", FinetuneConfig(epochs=2))
    parts = finetune(both.folder, data, tmp_path / "parts", FinetuneConfig(epochs=2, micro_batch=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.losses != whole.losses  # so it did something
    assert (parts.accuracy_before, parts.accuracy_after) == (whole.accuracy_before, whole.accuracy_after)
    one, other = (load_file(tmp_path / n / "adapter.safetensors") for n in ("whole", "parts"))
    assert all(distance(other[n], v) < 1e-4 for n, v in one.items())
    with pytest.raises(EngineError, match="onnxruntime-training has no micro-batches"):
        finetune(both.folder, data, tmp_path / "out", FinetuneConfig(micro_batch=3, engine="onnxruntime-training"))


def test_a_step_graph_that_was_altered_is_refused(data: Path, tmp_path: Path) -> None:
    artifact = build_steps(tmp_path / "a", StepRecipe())
    path = artifact.folder / "train_step.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"train_step\.onnx was altered"):
        finetune(artifact.folder, data, tmp_path / "out")


@pytest.fixture
def run(both: StepArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    np.savez(tmp_path / "local.npz", **arrays())
    return runner(both.folder, tmp_path / "local.npz", tmp_path, capsys=capsys)


def test_the_command_line_chooses_the_engine(run: Run, tmp_path: Path) -> None:
    for number, (options, engine) in enumerate(
        {(): "onnxruntime", ("--engine", "onnxruntime-training"): "onnxruntime-training"}.items()
    ):
        out = tmp_path / str(number)
        status, stdout, stderr = run(*options, "--json", out=out)
        assert status == 0
        assert json.loads(stdout)["engine"] == engine
        assert ("engine onnxruntime" in stderr.splitlines()) == (not options)
    status, _, stderr = run("--engine", "onnxruntime-training", "--micro-batch", 4, out=tmp_path / "new")
    assert (status, "has no micro-batches" in stderr) == (1, True)
    status, stdout, _ = run("--micro-batch", 4, "--quiet", out=tmp_path / "new")
    assert status == 0
