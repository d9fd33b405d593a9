"""A whole study on a small network of signals, its cells run in this process."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.commands.study import main
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.study import plots, runner
from lorac_deploy.study.bench import accuracy, open_bench
from lorac_deploy.study.cells import grid
from lorac_deploy.study.config import StudyConfig, StudyError, read_config
from lorac_deploy.study.runner import run_study
from lorac_deploy.study.worker import Row, read_row, row_file
from lorac_runtime.data import load_data
from lorac_runtime.manifest import InputSpec, load

FEATURES, CLASSES = 6, 3
STUDY = """
checkpoint = "base"
data = "pool.npz"
test = "test.npz"
drifts = ["flip", { name = "shifted", data = "shifted.npz", test = "shifted.npz" }]
sizes = [8, 40]
seeds = [0, 1]
training = { epochs = 3, batch_size = 8, lr = 0.05 }
[[methods]]
method = "head"
[[methods]]
method = "full"
"""


class Inline:
    """Runs what it is given at once, in this process."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as err:  # noqa: BLE001 - as a pool does
            future.set_exception(err)
        return future


@contextlib.contextmanager
def inline(_: int) -> Iterator[Inline]:
    yield Inline()


def signals(count: int, *, shift: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    samples = rng.normal(size=(count, FEATURES)).astype(np.float32)
    samples[np.arange(count), labels] += 3 + shift
    return {"samples": samples + np.float32(shift), "labels": labels.astype(np.int64)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's files, and its results in the folder study."""
    folder = tmp_path_factory.mktemp("study")
    spec = ModelSpec("mlp", classes=CLASSES, channels=FEATURES)
    given = InputSpec("input", (FEATURES,), 1.0, (0.0,), (1.0,), dtype="float32")
    save_checkpoint(folder / "base", build(spec), spec, input_spec=given, class_names=tuple("abc"), metrics={})
    np.savez(folder / "pool.npz", **signals(60))
    np.savez(folder / "test.npz", **signals(30, seed=1))
    np.savez(folder / "shifted.npz", **signals(50, shift=2.0, seed=2))
    (folder / "study.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_pool", inline)
        run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, to be changed and run again in this process."""
    monkeypatch.setattr(runner, "_pool", inline)
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def run(folder: Path) -> list[Row]:
    return run_study(read_config(folder / "study.toml"), folder / "study", on_progress=lambda *_: None)


def test_every_cell_of_the_grid_has_a_row_with_accuracies_and_costs(folder: Path) -> None:
    rows = run(folder)
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(row.failed is None and row.drifted is not None for row in rows)
    assert {row.costs["trained_parameters"] for row in rows if row.method == "head"} == {96 * 3 + 3}
    learned = [row for row in rows if row.method == "full" and row.size == 40]
    assert all(row.drifted is not None and row.drifted > row.base_drifted + 0.2 for row in learned)
    assert all([accuracy for _, accuracy in row.curve][-1] == row.drifted and len(row.curve) == 3 for row in rows)


def test_without_a_curve_results_are_the_same_and_seconds_are_told(folder: Path) -> None:
    before = run(folder)
    config = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text("curve = false\n" + config)
    shutil.rmtree(folder / "study" / "cells")
    (folder / "study" / "cells").mkdir()
    after = run(folder)
    assert [(row.drifted, row.clean) for row in after] == [(row.drifted, row.clean) for row in before]
    assert all(row.curve == () and row.seconds is not None and row.seconds > 0 for row in after)


def test_a_rows_accuracy_is_that_of_the_fused_file_on_the_drifted_test_samples(folder: Path) -> None:
    rows = run(folder)
    config = read_config(folder / "study.toml")
    bench = open_bench(config, folder / "study")
    artifact = bench.artifact(config.methods[0], 0)
    flip = config.drifts[0]
    manifest = load(artifact)
    test = load_data(bench.test(flip), manifest.input, CLASSES, manifest.class_names)
    assert np.array_equal(test.labels, CLASSES - 1 - signals(30, seed=1)["labels"])
    base = accuracy(artifact / "base.onnx", bench.test(flip), artifact)
    assert {row.base_drifted for row in rows if row.drift == "flip"} == {base}


def test_smaller_sizes_are_the_first_of_the_larger(folder: Path) -> None:
    run(folder)
    config = read_config(folder / "study.toml")
    bench = open_bench(config, folder / "study")
    found = np.load(bench.local(config.drifts[1], 1))["samples"]
    assert len(found) == 40
    pool = {tuple(sample) for sample in signals(50, shift=2.0, seed=2)["samples"]}
    assert all(tuple(sample) in pool for sample in found)


def test_a_study_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(folder)
    bench = open_bench(read_config(folder / "study.toml"), folder / "study")
    cells = grid(bench.config)
    row_file(bench, cells[3]).unlink()
    row_file(bench, cells[5]).write_text("{ half a file")
    ran: list[object] = []
    real = runner.run_cell
    monkeypatch.setattr(runner, "run_cell", lambda b, cell: (ran.append(cell), real(b, cell))[1])
    second = run(folder)
    assert ran == [cells[3], cells[5]]
    assert [row.drifted for row in second] == [row.drifted for row in first]


def test_a_study_that_was_moved_runs_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sorted((folder / "study" / "cells").iterdir())
    monkeypatch.setattr(runner, "run_cell", None)
    assert len(run(folder)) == len(kept) == 16
    monkeypatch.chdir(folder.parent)
    assert len(run(Path(folder.name))) == 16
    assert sorted((folder / "study" / "cells").iterdir()) == kept


def test_other_settings_and_other_data_are_other_cells(folder: Path) -> None:
    config = read_config(folder / "study.toml")
    keys = {cell.key(open_bench(config, folder / "study").sources) for cell in grid(config)}
    np.savez(folder / "pool.npz", **signals(60, seed=5))
    assert keys.isdisjoint(cell.key(open_bench(config, folder / "study").sources) for cell in grid(config))
    method = dataclasses.replace(config.methods[0], training=dataclasses.replace(config.methods[0].training, epochs=4))
    other = dataclasses.replace(config, methods=(method, config.methods[1]))
    same = {cell.key("x") for cell in grid(config)} & {cell.key("x") for cell in grid(other)}
    assert len(same) == len(keys) / 2


def test_what_fails_for_one_method_is_a_row_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STUDY.replace('[[methods]]\nmethod = "full"', '[[methods]]\nmethod = "full"\nlr = 1e30')
    (folder / "study.toml").write_text(text)
    assert main(["--config", str(folder / "study.toml"), "--out", str(folder / "study")]) == 1
    rows = run(folder)
    assert {row.method for row in rows if row.failed} == {"full lr=1e+30"}
    assert all(row.drifted is not None for row in rows if row.method == "head")
    shown = capsys.readouterr().out
    assert "failed: full lr=1e+30, flip, 8 samples, seed 0: " in shown
    assert "Accuracy (%) under drift" in shown


def test_the_command_writes_tables_and_plots(folder: Path) -> None:
    assert main(["--config", str(folder / "study.toml")]) == 0
    out = folder / "study"
    assert (out / "summary.md").read_text().startswith("### Accuracy (%) under drift")
    assert len((out / "results.csv").read_text().splitlines()) == 17
    for name in ("accuracy.png", "cost.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("part-*"))


def test_no_two_methods_look_the_same_in_a_plot() -> None:
    assert len({(plots._colour(k), plots._marker(k)) for k in range(70)}) == 70


def test_a_method_that_does_not_fit_the_network_is_named_before_any_training(folder: Path) -> None:
    (folder / "study.toml").write_text(STUDY.replace('method = "full"', 'method = "blocks"\nblocks = ["front"]'))
    with pytest.raises(StudyError, match=r"method 'blocks blocks=front' cannot train this network: .*convolution"):
        run(folder)


def test_more_samples_than_there_are_is_told_before_any_training(folder: Path) -> None:
    (folder / "study.toml").write_text(STUDY.replace("[8, 40]", "[8, 400]"))
    with pytest.raises(StudyError, match=r"400 samples are wanted, but .*\.npz has [56]0"):
        run(folder)
    assert len(list((folder / "study" / "cells").iterdir())) == 16  # those of before


def test_methods_that_need_no_labels_get_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = STUDY.replace('method = "head"', 'method = "head"\nloss = "entropy"').replace(
        "seeds = [0, 1]", "seeds = [0]"
    )
    (folder / "study.toml").write_text(text)
    shutil.rmtree(folder / "study" / "cells")
    seen: dict[str, set[str]] = {}
    real = runner.run_cell.__globals__["finetune"]

    def spy(artifact: Path, data: Path, *rest: Any, **named: Any) -> Any:
        seen.setdefault(load(artifact).training.loss, set()).update(np.load(data).files)
        return real(artifact, data, *rest, **named)

    monkeypatch.setitem(runner.run_cell.__globals__, "finetune", spy)
    run(folder)
    assert seen == {"entropy": {"samples"}, "cross_entropy": {"samples", "labels"}}


def test_a_row_of_another_version_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps({"method": "a"}))
    assert read_row(tmp_path / "row.json") is None


def test_the_grid_is_the_product_of_its_axes(folder: Path) -> None:
    config: StudyConfig = read_config(folder / "study.toml")
    cells = grid(config)
    assert len(set(cells)) == len(cells) == 16
    assert {c.size for c in cells} == {8, 40}
