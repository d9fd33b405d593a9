"""The benchmarks finetune, memory and startup: what they measure, and that every absence has a reason."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_case import SIZE, small_case, three_stages
from torch import nn

from benchmarks import finetune, finetune_peak, finetune_target, memory, memory_sizes, startup
from benchmarks import interpreters as environments
from benchmarks import step_competitors as sc
from benchmarks.finetune_cases import DEPTHS, GROWTH_BATCHES, SIZES, Point, Settings
from benchmarks.finetune_target import Task, base_row
from benchmarks.rows import Row, check_unique
from benchmarks.step_cases import Case, image_spec
from benchmarks.step_process import WorkerError, Workers
from benchmarks.step_worker_torch import saved_bytes
from lorac_deploy.checkpoint import Checkpoint
from lorac_deploy.models import ModelSpec
from lorac_exporters.costs import artifact_costs

HERE = {name: Path(sys.executable) for name in (environments.RUNTIME, environments.TRAINING, environments.PYTORCH)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return small_case(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """All in this environment."""
    with Workers(HERE, quick=True) as started:
        yield started


def test_everything_that_was_asked_for_is_measured() -> None:
    settings = Settings()
    asked = {(p.model, p.batch, p.threads) for p in settings.points}
    assert asked >= {("resnet20", batch, threads) for batch in (1, 8, 32) for threads in (1, 2)}
    assert asked >= {("resnet18", 8, 2), ("mobilenet_v2", 8, 2)}
    labels = {c.label for c in sc.EVERY}
    for who in ("ours", "onnxruntime-training", "PyTorch", "PyTorch compiled"):
        assert {f"{who}, {method}" for method in ("full", "head", "lora-c", "block", "skip")} <= labels
    assert {"ours, block + cache", "ours, skip + cache", sc.FLOOR} <= labels
    assert all({sc.FLOOR, sc.REFERENCE} <= {c.label for c in point.competitors} for point in settings.points)


def test_sweeps_say_which_value_they_sweep() -> None:
    found: dict[Any, list[Any]] = {}
    for point in Settings().sweeps:
        found.setdefault(point.settings["sweep"], []).append(point.settings[str(point.settings["sweep"])])
        assert [c.label for c in point.competitors] == [sc.FLOOR, sc.REFERENCE]
    assert {name: tuple(values) for name, values in found.items()} == {
        "rank": sc.RANKS,
        "batch": GROWTH_BATCHES,
        "depth": DEPTHS,
        "size": SIZES,
    }


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_points_measure_the_same(quick: bool) -> None:
    settings = Settings(quick=quick)
    keys = [(p.model, c.label, tuple(p.settings.items())) for p in settings.points for c in p.competitors]
    keys += [(p.model, c.label, tuple(p.settings.items())) for p in settings.sweeps for c in p.competitors]
    assert len(keys) == len(set(keys))


def test_the_peak_is_that_of_the_faster_operator_and_shares_are_of_it(workers: Workers) -> None:
    peak, found = finetune_peak.measured(workers, (1,))
    figures = [row.figure for row in found if row.figure is not None]
    assert len(figures) == 2
    assert peak.best == {1: max(figures)}
    assert peak.share(1000, 0.5, 1) == {"share of peak": 1000 / 0.5 / max(figures)}
    assert peak.share(1000, 0.5, 2) == {}
    for row in found:
        assert row.figure == pytest.approx(row.details["multiply-adds"] / row.details["minimum"])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Two epochs of four images of 8 x 8; six more to test on."""
    folder, rng = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    for name, count in (("local", 4), ("test", 6)):
        images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=rng.integers(0, 10, count))
    competitors = sc.chosen(sc.REFERENCE, "PyTorch, head", "onnxruntime-training, skip")
    return Task(Point("three stages", 2, 1, competitors, size=SIZE), folder / "local.npz", folder / "test.npz", 2)


def targeted(task: Task, case: Case, workers: Workers) -> dict[tuple[str, str], Row]:
    found: dict[str, Any] = {}
    made = [r for c in task.point.competitors for r in finetune_target.competitor_rows(task, case, workers, c, found)]
    check_unique(made)
    return {(row.variant, row.quantity): row for row in made}


def test_a_target_that_is_not_reached_has_no_time_but_the_accuracy(
    task: Task, case: Case, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_target, "TARGET", 1.1)
    found = targeted(task, case, workers)
    missed = found[sc.REFERENCE, "time to target"]
    accuracy = found[sc.REFERENCE, "accuracy"]
    assert missed.figure is None
    assert missed.note == f"not reached in 2 epochs: {accuracy.figure:.1f} %"
    assert accuracy.details["epochs"] == len(accuracy.details["seconds"]) == 2
    for quantity in ("time to target", "accuracy"):
        refused = found["onnxruntime-training, skip", quantity]
        assert refused.figure is None
        assert "onnxruntime-training" in refused.note


def test_the_time_to_a_target_is_that_of_all_epochs_and_compared_with_the_reference(
    task: Task, case: Case, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_target, "TARGET", 0.0)
    found = targeted(task, case, workers)
    reference, other = (found[name, "time to target"] for name in (sc.REFERENCE, "PyTorch, head"))
    assert reference.figure is not None
    assert other.figure == sum(other.details["seconds"])
    assert other.ratio == pytest.approx(sum(other.details["seconds"]) / reference.figure)
    assert other.details["peak lr"] == 0.03
    assert reference.details["peak lr"] == 0.001


def test_the_accuracy_before_fine_tuning_has_a_row(task: Task) -> None:
    module = three_stages()
    with torch.no_grad():
        module.get_parameter("13.bias").copy_(torch.eye(10)[3] * 1e6)
    base = Checkpoint(module, ModelSpec("resnet20", 10), image_spec(SIZE), tuple("0123456789"), {})
    with np.load(task.test) as arrays:
        threes = 100 * float(np.mean(arrays["labels"] == 3))
    assert base_row(task, base).figure == pytest.approx(threes)


def test_digits_to_train_with_fill_whole_batches_and_others_test(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    made = finetune_target.prepared(tmp_path, (), 3)
    with np.load(made.local) as local, np.load(made.test) as test:
        assert len(local["labels"]) % finetune_target.BATCH == 0
        assert len(test["labels"]) > 200
        assert local["images"].shape[1:] == test["images"].shape[1:] == (32, 32, 3)


def test_memory_measures_fresh_processes_and_what_cannot_run_has_a_reason(case: Case) -> None:
    settings = memory.Settings(quick=True, python=HERE)
    imported: dict[tuple[str, str], Row] = {}
    for competitor in sc.chosen("ours, block + cache", "onnxruntime-training, skip"):
        found = {row.quantity: row for row in memory.measured(settings, case, 2, imported, competitor)}
        if competitor.variant == "skip":
            assert found["peak memory"].figure is None
            assert "onnxruntime-training" in found["peak memory"].note
        else:
            (before,) = imported.values()
            assert before.figure is not None
            assert found["peak memory"].figure is not None
            assert 10e6 < before.figure < found["peak memory"].figure
            assert found["saved activations"].figure == artifact_costs(case.artifact("block"), 2).saved_bytes


def test_saved_activations_of_pytorch_count_each_storage_once_and_no_parameters() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    images, labels = torch.randn(5, 1, 2, 3), torch.zeros(5, dtype=torch.int64)
    # the hidden values (one storage, kept twice), log-probabilities, and the total weight of the mean
    assert saved_bytes(net, images, labels) == 4 * (5 * 4 + 5 * 3 + 1)


def test_sizes_are_those_of_the_files_that_an_engine_needs(case: Case) -> None:
    found = {(r.variant, r.quantity): r for r in memory_sizes.size_rows(case, sc.of("ours,", "onnxruntime-training,"))}
    folder = case.artifact("lora-c")
    adapter, artifact = (found[sc.REFERENCE, quantity] for quantity in ("adapter", "artifact"))
    assert adapter.figure == (folder / "adapter.safetensors").stat().st_size
    files = artifact.details["files"]
    assert {"manifest.json", "base.onnx", "train_step.onnx"} <= set(files)
    assert "training_model.onnx" not in files
    assert artifact.figure == sum((folder / name).stat().st_size for name in files)
    native = found["onnxruntime-training, lora-c", "artifact"]
    assert {"training_model.onnx", "checkpoint"} <= set(native.details["files"])
    assert ("onnxruntime-training, skip", "artifact") not in found
    check_unique(found.values())


def test_a_first_step_is_timed_from_the_start_of_its_process(case: Case) -> None:
    settings = startup.Settings(quick=True, python=HERE)
    seconds, note = startup.first_step(settings, case, sc.COMPETITORS["ours, head"])
    assert 0.05 < seconds < 300
    assert note == ""
    lost = dataclasses.replace(sc.COMPETITORS["ours, head"], worker="benchmarks.no_such_module")
    with pytest.raises(WorkerError, match="no_such_module"):
        startup.first_step(settings, case, lost)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "steps,speed"], "no part speed: choose from steps, target, growth"),
        (["--python", "bench=x"], "--python wants NAME=PATH with a name of project, onnxruntime"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune.main(arguments)
    assert ended.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())
