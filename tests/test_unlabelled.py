"""Local data without labels: what adapts from it, and that labels that are there change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from norm_networks import export

from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.cli import main
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import ArtifactError, CheckpointError, DataError, OutputError
from lorac_runtime.report import FinetuneReport
from lorac_runtime.session import Progress, finetune

CONFIG = FinetuneConfig(epochs=2, batch_size=8, lr=0.1)
ALL = dataclasses.replace(CONFIG, val_fraction=0.0)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for method in ("tent", "recalibrate", "bias"):
        export(folder / method, method)
    return folder


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)


def labels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(24) % 4)


def unlabelled(folder: Path) -> Path:
    np.savez(folder / "unlabelled.npz", images=images())
    return folder / "unlabelled.npz"


def labelled(folder: Path, seed: int = 0) -> Path:
    np.savez(folder / f"labelled{seed}.npz", images=images(), labels=labels(seed))
    return folder / f"labelled{seed}.npz"


def flat_folder(folder: Path) -> Path:
    from PIL import Image

    (folder / "photos").mkdir()
    for number, image in enumerate(images()):
        Image.fromarray(image).save(folder / "photos" / f"{number:02}.png")
    return folder / "photos"


def adapted(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in (mf.ADAPTER, "fused.onnx")}


@pytest.mark.parametrize("method", ["tent", "recalibrate"])
def test_labels_change_no_bit_of_the_result(artifacts: Path, tmp_path: Path, method: str) -> None:
    config = ALL if method == "tent" else FinetuneConfig(batch_size=8, val_fraction=0.0)
    sources = [unlabelled(tmp_path), labelled(tmp_path), labelled(tmp_path, 1), flat_folder(tmp_path)]
    results = []
    for number, data in enumerate(sources):
        finetune(artifacts / method, data, tmp_path / str(number), config)
        results.append(adapted(tmp_path / str(number)))
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0]["fused.onnx"] != (artifacts / method / mf.BASE).read_bytes()


def test_without_labels_there_are_losses_but_no_accuracies(artifacts: Path, tmp_path: Path) -> None:
    longer = dataclasses.replace(CONFIG, epochs=5)
    report = finetune(artifacts / "tent", unlabelled(tmp_path), tmp_path / "out", longer)
    assert (report.accuracy_before, report.accuracy_after, report.val_images) == (None, None, 5)
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.epoch_losses[-1] < report.epoch_losses[0]
    assert len(report.losses) == 5 * 3
    assert verify(artifacts / "tent" / mf.BASE, tmp_path / "out" / "fused.onnx").ok
    with_labels = finetune(artifacts / "tent", labelled(tmp_path), tmp_path / "other", CONFIG)
    assert with_labels.accuracy_before is not None
    assert with_labels.accuracy_after is not None


def test_an_interrupted_run_without_labels_goes_on(artifacts: Path, tmp_path: Path) -> None:
    data = unlabelled(tmp_path)

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(artifacts / "tent", data, tmp_path / "out", CONFIG, on_progress=interrupt)
    with pytest.raises(CheckpointError, match="data: "):
        finetune(artifacts / "tent", labelled(tmp_path), tmp_path / "out", CONFIG)
    resumed = finetune(artifacts / "tent", data, tmp_path / "out", CONFIG)
    whole = finetune(artifacts / "tent", data, tmp_path / "whole", CONFIG)
    assert resumed.losses == whole.losses
    assert adapted(tmp_path / "out") == adapted(tmp_path / "whole")


def recalibrated(artifacts: Path, tmp_path: Path, data: Path) -> FinetuneReport:
    return finetune(artifacts / "recalibrate", data, tmp_path / "out", FinetuneConfig(batch_size=8))


def test_recalibration_leaves_what_any_run_leaves(artifacts: Path, tmp_path: Path) -> None:
    report = recalibrated(artifacts, tmp_path, unlabelled(tmp_path))
    assert (report.settings.epochs, report.losses, report.epoch_losses) == (0, (), ())
    assert (report.trained_parameters, report.step_seconds, report.train_images) == (0, 0.0, 19)
    assert report.loss_before != report.loss_after
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [mf.ADAPTER, "fused.onnx", "report.json"]
    own, new = (load_adapter(folder / mf.ADAPTER).tensors for folder in (artifacts / "recalibrate", tmp_path / "out"))
    moved = [name for name in own if not np.array_equal(own[name], new[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"running_mean", "running_var"}
    assert verify(artifacts / "recalibrate" / mf.BASE, tmp_path / "out" / "fused.onnx").ok
    assert recalibrated(artifacts, tmp_path, unlabelled(tmp_path)) == report  # finished: nothing is done again
    with pytest.raises(OutputError, match="finished run of another kind"):
        recalibrated(artifacts, tmp_path, labelled(tmp_path))


def test_recalibration_with_labels_says_what_it_is_good_for(artifacts: Path, tmp_path: Path) -> None:
    report = recalibrated(artifacts, tmp_path, labelled(tmp_path))
    assert report.accuracy_before is not None
    assert report.accuracy_after is not None


@pytest.mark.parametrize("options", [{"epochs": 3}, {"lr": 0.1}, {"warmup": 0.5}])
def test_settings_of_a_training_are_refused_where_nothing_trains(
    artifacts: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    (name,) = options
    with pytest.raises(
        ArtifactError, match=rf"trains nothing \(method recalibrate\), so --{name} would change nothing"
    ):
        finetune(artifacts / "recalibrate", unlabelled(tmp_path), tmp_path / "out", FinetuneConfig(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_learns_from_labels_refuses_data_without(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no labels, only \['images'\].*Only artifacts of the methods tent and re"):
        finetune(artifacts / "bias", unlabelled(tmp_path), tmp_path / "out", CONFIG)
    with pytest.raises(DataError, match="24 images without labels"):
        finetune(artifacts / "bias", flat_folder(tmp_path), tmp_path / "out", CONFIG)


def test_the_command_says_why_there_are_no_accuracies(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(unlabelled(tmp_path))]
    assert main([str(artifacts / "tent"), *data, "--out", str(tmp_path / "tent"), "--epochs", "1"]) == 0
    assert "accuracy  not measured: no labels\n" in capsys.readouterr().out
    assert main([str(artifacts / "recalibrate"), *data, "--out", str(tmp_path / "stats")]) == 0
    text = capsys.readouterr().out
    assert "after, on held-out samples; nothing trained" in text
    assert "a step" not in text
    assert main([str(artifacts / "recalibrate"), *data, "--out", str(tmp_path / "x"), "--epochs", "2"]) == 1
    assert "--epochs would change nothing" in capsys.readouterr().err
