"""The demo's parts; the whole of it is `make demo`, which fails where it does not keep its promises."""

from __future__ import annotations

import dataclasses
import json
import sys
import venv
from io import StringIO
from pathlib import Path

import artifacts
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from rich.console import Console

from lorac_deploy.corruptions import corrupt
from lorac_deploy.demo import device
from lorac_deploy.demo.__main__ import main
from lorac_deploy.demo.loop import prepare
from lorac_deploy.demo.parts import PartsConfig, stratified_order, write_parts
from lorac_deploy.demo.results import Results, broken_promises, plot, table
from lorac_runtime.errors import EngineError, OutputError

GOOD = Results(
    base_clean=0.98,
    base_drifted=0.2,
    adapted_clean=0.6,
    adapted_drifted=0.95,
    trained_parameters=29_000,
    model_parameters=1_000_000,
    engine="onnxruntime-training",
    drop_in=True,
    losses=(2.0, 1.0, 0.5),
    step_seconds=0.25,
    peak_memory_bytes=300_000_000,
    device_environment_bytes=270_000_000,
    images={"base": 1000, "local": 300, "test": 497},
    drift="low_light, severity 5",
    seconds=100.0,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data that the demo writes."""
    folder = tmp_path_factory.mktemp("parts")
    assert write_parts(folder, PartsConfig()) == {"base": 1000, "local": 300, "test": 497}
    return folder


def test_no_digit_is_in_two_sets(parts: Path) -> None:
    base, local, test = (np.load(parts / f"{name}.npz")["images"] for name in ("base", "local", "test_drifted"))
    config = PartsConfig()
    base_drifted = corrupt(base, config.drift, config.severity, seed=config.seed)  # as local and test are
    seen = np.concatenate([base_drifted, local, test]).reshape(1797, -1)
    assert len(np.unique(seen, axis=0)) == 1797


def test_every_set_holds_every_digit_in_its_share(parts: Path) -> None:
    for name in ("base", "local", "test_clean"):
        counts = np.bincount(np.load(parts / f"{name}.npz")["labels"], minlength=10)
        assert counts.min() >= 0.09 * counts.sum(), name


def test_the_drift_changes_the_images_and_not_the_labels(parts: Path) -> None:
    clean, drifted = (np.load(parts / f"test_{name}.npz") for name in ("clean", "drifted"))
    np.testing.assert_array_equal(clean["labels"], drifted["labels"])
    assert drifted["images"].mean() < 0.2 * clean["images"].mean()


def test_another_seed_gives_another_order() -> None:
    labels = np.repeat(np.arange(10), 20)
    assert (stratified_order(labels, 0) != stratified_order(labels, 1)).any()
    assert sorted(stratified_order(labels, 0)) == list(range(200))


def test_a_python_with_torch_is_no_device() -> None:
    with pytest.raises(EngineError, match="has PyTorch"):
        device.require_no_torch(Path(sys.executable))


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="make device-env"):
        device.require_no_torch(tmp_path / "python")


def test_a_python_without_torch_passes(tmp_path: Path, root: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "runtime.pth").write_text(str(root / "runtime"))
    for name in ("numpy", "numpy.libs", "safetensors"):
        (site / name).symlink_to(Path(np.__file__).parents[1] / name)
    python = tmp_path / "bin" / "python"
    device.require_no_torch(python)
    assert device.run(python, ["-c", "import lorac_runtime"]).returncode == 0


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(device, "require_no_torch", lambda python: None)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        prepare(tmp_path, Path("python"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "thesis.txt").rename(tmp_path / "summary.json")
    prepare(tmp_path, Path("python"))
    assert not any(tmp_path.iterdir())


def test_a_run_that_keeps_its_promises_breaks_none() -> None:
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    "worse",
    [
        {"base_clean": 0.969},
        {"base_drifted": 0.75},
        {"adapted_drifted": 0.919},
        {"trained_parameters": 30_000},
        {"drop_in": False},
    ],
    ids=lambda worse: next(iter(worse)),
)
def test_each_broken_promise_is_told(worse: dict[str, float]) -> None:
    assert len(broken_promises(dataclasses.replace(GOOD, **worse))) == 1  # type: ignore[arg-type]


def test_the_summary_holds_the_figures_as_fractions() -> None:
    summary = json.loads(GOOD.to_json())
    wanted = {"base_clean", "base_drifted", "adapted_clean", "adapted_drifted"}
    wanted |= {"trained_parameters", "model_parameters", "engine", "seconds"}
    assert wanted <= set(summary)
    assert summary["adapted_drifted"] == 0.95


def test_the_table_shows_before_and_after() -> None:
    console = Console(file=StringIO(), width=100)
    console.print(table(GOOD))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(figure in text for figure in ("98.0%", "20.0%", "60.0%", "95.0%", "2.90%"))


def test_the_plot_is_a_picture_that_depends_on_the_figures(tmp_path: Path) -> None:
    plot(GOOD, tmp_path / "a.png")
    plot(dataclasses.replace(GOOD, adapted_drifted=0.5), tmp_path / "b.png")
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    assert pixels[0].shape == pixels[1].shape
    assert (pixels[0] != pixels[1]).any()


def test_a_failure_is_one_message_and_an_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--device-python", sys.executable, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_accuracy_is_that_of_the_logits(tmp_path: Path) -> None:
    tiny = artifacts.build(tmp_path / "artifact")
    images = np.random.default_rng(0).integers(0, 256, (100, artifacts.H, artifacts.W, artifacts.C), dtype=np.uint8)
    labels = np.arange(100) % artifacts.CLASSES
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    session = onnxruntime.InferenceSession(tiny.folder / "base.onnx")
    pixels = (images / 255 - 0.5).transpose(0, 3, 1, 2).astype(np.float32)
    (logits,) = session.run(None, {"input": pixels})
    expected = float(np.mean(logits.argmax(axis=1) == labels))
    assert 0 < expected < 1
    python = Path(sys.executable)
    assert device.accuracy(python, tiny.folder / "base.onnx", tiny.folder, tmp_path / "data.npz") == expected


def test_a_failing_evaluation_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a training artifact"):
        device.accuracy(Path(sys.executable), tmp_path / "model.onnx", tmp_path, tmp_path / "data.npz")
