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
import tflite_pairs
from PIL import Image
from rich.console import Console

from lorac_deploy.corruptions import corrupt
from lorac_deploy.demo import device, evaluate, lite
from lorac_deploy.demo.__main__ import main
from lorac_deploy.demo.device import Device
from lorac_deploy.demo.loop import prepare
from lorac_deploy.demo.parts import PartsConfig, stratified_order, write_parts
from lorac_deploy.demo.results import EngineRow, LiteRow, Results, broken_promises, plot, table
from lorac_exporters.tflite import running
from lorac_runtime.errors import EngineError, OutputError

PLAIN = EngineRow(
    engine="onnxruntime",
    adapted_clean=0.6,
    adapted_drifted=0.95,
    drop_in=True,
    losses=(2.0, 1.0, 0.5),
    step_seconds=0.25,
    peak_memory_bytes=300 * 2**20,
    device_environment_bytes=140 * 2**20,
    finetune_seconds=30.0,
    versions={"onnxruntime": "1.31.1"},
    tflite=LiteRow(True, 44_000_000, adapted_clean=0.598, adapted_drifted=0.952),
)
TRAINING = dataclasses.replace(
    PLAIN,
    tflite=None,
    engine="onnxruntime-training",
    adapted_clean=0.61,
    adapted_drifted=0.94,
    losses=(2.0, 1.1, 0.6),
    step_seconds=0.5,
    peak_memory_bytes=None,
    device_environment_bytes=120 * 2**20,
)
GOOD = Results(
    base_clean=0.98,
    base_drifted=0.2,
    trained_parameters=29_000,
    model_parameters=1_000_000,
    engines=(PLAIN, TRAINING),
    images={"base": 1000, "local": 300, "test": 497},
    drift="low_light, severity 5",
    seconds=100.0,
)


def worse(engine: int = 0, **changes: float) -> Results:
    """GOOD with other figures, of an engine's row where they are its own."""
    own = {field.name for field in dataclasses.fields(EngineRow)}
    if not changes.keys() <= own:
        return dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    rows = list(GOOD.engines)
    rows[engine] = dataclasses.replace(rows[engine], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(GOOD, engines=tuple(rows))


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
    checked: list[Path] = []
    monkeypatch.setattr(device, "require_no_torch", checked.append)
    devices = [Device("onnxruntime", Path("a"), "adapted"), Device("onnxruntime-training", Path("b"), "adapted2")]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        prepare(tmp_path, devices)
    assert checked == [Path("a"), Path("b")]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "thesis.txt").rename(tmp_path / "summary.json")
    prepare(tmp_path, devices)
    assert not any(tmp_path.iterdir())


def test_a_run_that_keeps_its_promises_breaks_none() -> None:
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"base_clean": 0.969},
        {"base_drifted": 0.75},
        {"trained_parameters": 30_000},
        {"adapted_drifted": 0.919, "tflite": None},
        {"drop_in": False},
        {"engine": 1, "adapted_drifted": 0.919},
        {"engine": 1, "drop_in": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_each_broken_promise_is_told(changes: dict[str, float]) -> None:
    (told,) = broken_promises(worse(**changes))  # type: ignore[arg-type]
    assert ("onnxruntime-training" in told) == ("engine" in changes)


@pytest.mark.parametrize(
    ("lite", "text"),
    [
        (LiteRow(False, 1, 0.6, 0.95), "fused.tflite is a drop-in for base.tflite"),
        (LiteRow(True, 1, 0.6, 0.94), "fused.tflite as accurate as fused.onnx (95.0%), got 94.0%"),
    ],
)
def test_a_fused_tflite_that_is_no_drop_in_or_answers_otherwise_is_told(lite: LiteRow, text: str) -> None:
    (told,) = broken_promises(worse(tflite=lite))  # type: ignore[arg-type]
    assert text in told


def test_without_an_interpreter_the_fused_tflite_is_verified_and_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken_promises(worse(tflite=LiteRow(True, 1, None, None))) == []  # type: ignore[arg-type]
    console = Console(file=StringIO(), width=80)
    console.print(table(worse(tflite=LiteRow(True, 1, None, None))))  # type: ignore[arg-type]
    assert "no runtime" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_accuracy_of_a_tflite_file_is_that_of_its_onnx_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tflite_pairs.artifact(tmp_path / "artifact", "float32")
    images = np.random.default_rng(0).integers(0, 256, (70, 10, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(70) % 4)
    arguments = (made / "base.tflite", made, tmp_path / "data.npz")
    expected = evaluate.accuracy(made / "base.onnx", *arguments[1:])
    assert 0 < expected < 1
    assert lite.accuracy(*arguments) == expected
    monkeypatch.setattr(running, "_RUNTIMES", ("no_such_runtime",))
    assert lite.accuracy(*arguments) is None


def test_the_summary_holds_the_figures_as_fractions_and_each_engines_row() -> None:
    summary = json.loads(GOOD.to_json())
    wanted = {"base_clean", "base_drifted", "adapted_clean", "adapted_drifted", "drop_in", "losses", "step_seconds"}
    wanted |= {"trained_parameters", "model_parameters", "engine", "seconds", "images", "drift"}
    wanted |= {"peak_memory_bytes", "device_environment_bytes", "tflite"}
    assert wanted <= set(summary)
    assert summary["engine"] == "onnxruntime"
    assert summary["adapted_drifted"] == 0.95
    assert [(row["engine"], row["adapted_drifted"]) for row in summary["engines"]] == [
        ("onnxruntime", 0.95),
        ("onnxruntime-training", 0.94),
    ]


def test_the_table_shows_before_and_after_with_each_engine_in_80_columns() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(table(GOOD))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()[1:]}
    assert rows["base"] == ["20.0%", "98.0%"]
    assert " ".join(rows["onnxruntime"]) == "95.0% 60.0% 250 ms 300 MiB 140 MiB 30 s yes"
    assert rows["fused.tflite"] == ["95.2%", "59.8%", "yes"]
    assert " ".join(rows["onnxruntime-training"]) == "94.0% 61.0% 500 ms unknown 120 MiB 30 s yes"
    assert "2.90%" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_plot_is_a_picture_that_depends_on_every_engines_figures(tmp_path: Path) -> None:
    others = [worse(adapted_drifted=0.5), worse(1, adapted_drifted=0.5), worse(1, losses=(2.0, 1.5, 0.6))]  # type: ignore[arg-type]
    for number, results in enumerate([GOOD, *others]):
        plot(results, tmp_path / f"{number}.png")
    first, *rest = [np.asarray(Image.open(tmp_path / f"{number}.png")) for number in range(4)]
    for pixels in rest:
        assert pixels.shape == first.shape
        assert (pixels != first).any()


def test_what_installs_packages_is_not_counted_as_installed(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, size in {"pip/a.py": 1, "pip-24.0.dist-info/b": 2, "setuptools/c": 4, "numpy/pip.py": 8}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(bytes(size))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_bytes(bytes(16))
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert device.installed_bytes(tmp_path / "bin" / "python") == 24


def test_a_failure_is_one_message_and_an_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--device-python", str(tmp_path / "python"), "--out", str(tmp_path)]) == 1
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
