"""The competitors of the fine-tuning benchmarks do what they say: same network, same training, fair turns."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_case import SIZE, small_case

from benchmarks import finetune_cases
from benchmarks import interpreters as environments
from benchmarks import step_competitors as sc
from benchmarks.finetune_cases import Cases, Effort, Point, compared, row
from benchmarks.finetune_peak import Peak
from benchmarks.finetune_steps import Measured, opened, rows
from benchmarks.rows import Row, check_unique
from benchmarks.step_cases import Case
from benchmarks.step_process import Worker, WorkerError, Workers, place
from benchmarks.step_protocol import Job, Run
from lorac_runtime.manifest import InputSpec

HERE = {name: Path(sys.executable) for name in (environments.RUNTIME, environments.TRAINING, environments.PYTORCH)}
BATCH, EFFORT = 3, Effort(0.0, 2, 2, steps=2, warmup=2)
COMPETITORS = sc.chosen(
    sc.FLOOR,
    sc.REFERENCE,
    "ours, block + cache",
    "ours, skip",
    "onnxruntime-training, lora-c",
    "onnxruntime-training, skip",
    "PyTorch, lora-c as branches",
    "PyTorch, skip",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return small_case(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """All in this environment."""
    with Workers(HERE, quick=True) as started:
        yield started


@pytest.fixture(scope="module")
def point(case: Case) -> Point:
    return Point(case.model, BATCH, 1, COMPETITORS, size=SIZE, epoch_images=6)


@pytest.fixture(scope="module")
def found(case: Case, workers: Workers, point: Point) -> list[Row]:
    """What a run of eight competitors finds."""
    return rows(workers, case, point, EFFORT, peak=Peak({1: 1e9}), say=lambda _: None)


def of(found: list[Row], quantity: str) -> dict[str, Row]:
    return {row.variant: row for row in found if row.quantity == quantity}


@pytest.mark.parametrize(
    "name",
    ["interpreters", "step_competitors", "step_rounds", "step_worker_forward", "finetune_cases"],
)
def test_examples_in_docstrings_hold(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert tried.attempted > 0
    assert tried.failed == 0


def test_all_competitors_step_the_same_network_on_the_same_batch(found: list[Row]) -> None:
    steps = of(found, "step")
    assert steps.keys() == {c.label for c in COMPETITORS}
    losses = [row.details["first loss"] for row in steps.values() if row.figure is not None]
    assert len(losses) == 7
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)


def test_what_an_engine_cannot_train_has_a_row_that_says_why(found: list[Row]) -> None:
    refused = of(found, "step")["onnxruntime-training, skip"]
    assert refused.figure is None
    assert "onnxruntime-training" in refused.note


def test_steps_are_compared_with_the_reference_and_with_the_floor_in_the_same_rounds(found: list[Row]) -> None:
    steps, floors = of(found, "step"), of(found, "step over floor")
    assert steps[sc.REFERENCE].ratio is None
    assert {row.reference for row in steps.values()} - {""} == {sc.REFERENCE}
    for name, made in floors.items():
        assert name != sc.FLOOR
        samples, floor = (steps[n].details["samples"] for n in (name, sc.FLOOR))
        assert len(samples) == len(floor) == 4
        assert made.details["ratio of minima"] == pytest.approx(min(samples) / min(floor))


def test_the_work_of_a_step_is_held_against_the_peak(found: list[Row]) -> None:
    steps = of(found, "step")
    ours, floor, cached = (steps[name] for name in (sc.REFERENCE, sc.FLOOR, "ours, block + cache"))
    for made in (ours, floor, cached):
        assert made.figure is not None
        assert made.details["share of peak"] == pytest.approx(made.details["multiply-adds"] / made.figure / 1e9)
    assert cached.details["multiply-adds"] < floor.details["multiply-adds"] < ours.details["multiply-adds"]
    assert "multiply-adds" not in steps["PyTorch, skip"].details


def test_epochs_tell_the_first_from_later_ones(found: list[Row]) -> None:
    epochs = [row for row in found if row.quantity == "epoch"]
    trained = {c.label for c in COMPETITORS} - {sc.FLOOR, "onnxruntime-training, skip"}
    assert {(row.variant, row.settings["epoch"]) for row in epochs} == {
        (name, which) for name in trained for which in ("first", "later")
    }
    assert all(row.figure and row.settings["images"] == 6 for row in epochs)
    check_unique(found)


@pytest.fixture(scope="module")
def trained(case: Case, workers: Workers) -> dict[str, dict[str, Any]]:
    """Two epochs of four images with every library, images of another file classified after each."""
    run = Run(str(case.local(4)), 2, 2, lr=1e-2, warmup=0.5, test=str(case.local(5)))
    told = {}
    for competitor in [c for c in COMPETITORS if c.label not in (sc.FLOOR, "onnxruntime-training, skip")]:
        session = workers.open(competitor, case, batch=2, threads=1)
        session.ask("step", count=1)  # must not be where epochs begin
        told[competitor.label] = session.ask("epochs", run=dataclasses.asdict(run))
        session.ask("close")
    return told


def test_whole_epochs_are_the_same_training_everywhere(trained: dict[str, dict[str, Any]]) -> None:
    reference = trained[sc.REFERENCE]
    assert reference["losses"][1] != pytest.approx(reference["first_loss"], rel=1e-3)
    for name in ("onnxruntime-training, lora-c", "PyTorch, lora-c as branches"):
        assert trained[name]["first_loss"] == pytest.approx(reference["first_loss"], rel=1e-5)
        assert trained[name]["losses"] == pytest.approx(reference["losses"], rel=0.05)
        assert len(trained[name]["accuracies"]) == len(trained[name]["seconds"]) == 2
    assert trained["PyTorch, skip"]["losses"] == pytest.approx(trained["ours, skip"]["losses"], rel=1e-3)


def test_a_run_ends_when_the_target_is_reached(case: Case, workers: Workers) -> None:
    run = Run(str(case.local(4)), 5, 2, lr=1e-3, warmup=0.5, test=str(case.local(5)), target=0.0)
    for label in (sc.REFERENCE, "PyTorch, skip"):
        session = workers.open(sc.COMPETITORS[label], case, batch=2, threads=1)
        assert len(session.ask("epochs", run=dataclasses.asdict(run))["seconds"]) == 1
        session.ask("close")


def test_training_moves_a_competitor_and_a_forward_pass_not_at_all(case: Case, workers: Workers, point: Point) -> None:
    measured = Measured()
    few = dataclasses.replace(point, competitors=sc.chosen(sc.FLOOR, sc.REFERENCE, "PyTorch, lora-c as branches"))
    opened(measured, workers, case, few, EFFORT)
    changes = {}
    for name, session in measured.sessions.items():
        changes[name] = session.ask("step", count=40)["losses"][-1] - measured.losses[name]
        session.ask("close")
    assert changes[sc.FLOOR] == 0
    assert changes[sc.REFERENCE] < -1e-4
    assert changes["PyTorch, lora-c as branches"] == pytest.approx(changes[sc.REFERENCE], rel=0.01)


def test_another_loss_gets_a_note_and_no_ratio(case: Case, workers: Workers, point: Point) -> None:
    other = dataclasses.replace(sc.COMPETITORS[sc.REFERENCE], label="other")
    few = dataclasses.replace(point, competitors=(*sc.chosen(sc.FLOOR, sc.REFERENCE), other), epoch_images=0)
    found = rows(_OnAnotherBatch(workers), case, few, EFFORT, peak=Peak({}), say=lambda _: None)  # type: ignore[arg-type]
    (made,) = [row for row in found if row.variant == "other" and row.quantity == "step"]
    assert "another loss" in made.note
    assert made.ratio is None
    assert of(found, "step over floor").keys() == {sc.REFERENCE}


class _OnAnotherBatch:
    """Opens the competitor called other with an image more."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def open(self, competitor: sc.Competitor, case: Case, *, batch: int, threads: int) -> Any:
        if competitor.label != "other":
            return self._workers.open(competitor, case, batch=batch, threads=threads)
        known = dataclasses.replace(competitor, variant="lora-c")
        return self._workers.open(known, case, batch=batch + 1, threads=threads)


def test_a_competitor_that_fails_is_refused_with_its_reason_and_the_others_go_on(workers: Workers, case: Case) -> None:
    nowhere = Job(str(case.folder / "nowhere"), str(case.batch(2)), 1, {"passes": 1})
    with pytest.raises(WorkerError, match="nowhere"):
        workers.open_job(sc.COMPETITORS[sc.FLOOR], nowhere)
    assert workers.open(sc.COMPETITORS[sc.FLOOR], case, batch=2, threads=1).ask("step", count=1)["seconds"]


def test_a_worker_that_ends_leaves_its_last_words_and_is_started_anew(case: Case) -> None:
    gone = dataclasses.replace(sc.COMPETITORS[sc.FLOOR], worker="benchmarks.no_such_module")
    text = r"ended with status 1: .*No module named benchmarks.no_such_module"
    with Workers(HERE, quick=True) as workers:
        for _ in range(2):
            with pytest.raises(WorkerError, match=text):
                workers.open(gone, case, batch=2, threads=1)


def test_rows_are_compared_with_the_reference_of_the_same_settings() -> None:
    points = [Point("resnet20", batch, 1, ()) for batch in (1, 8)]
    other, reference = sc.COMPETITORS["ours, full"], sc.COMPETITORS[sc.REFERENCE]
    made = [row(points[0], reference, "x", 2.0, "s"), row(points[0], other, "x", 3.0, "s")]
    made += [row(points[1], other, "x", 3.0, "s"), row(points[0], other, "y", None, "s")]
    assert [one.ratio for one in compared(made)] == [None, 1.5, None, None]


def test_peak_memory_is_that_of_the_process() -> None:
    code = (
        "from benchmarks.step_protocol import peak_bytes; before = peak_bytes(); "
        "x = b'1' * 200_000_000; del x; print(peak_bytes() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=environments.ROOT, capture_output=True, text=True, check=True
    )
    assert 190e6 < int(done.stdout) < 210e6


def test_every_competitor_names_a_variant_and_an_environment_that_exist() -> None:
    known = {*sc.VARIANTS, sc.SIMPLIFIED}
    for competitor in sc.COMPETITORS.values():
        assert competitor.variant in known
        assert competitor.environment in environments.NAMES
        assert importlib.util.find_spec(competitor.worker) is not None


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout where no environment has been made."""
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    return tmp_path


def test_the_projects_environment_stands_in_where_it_has_the_packages_and_says_so(bare: Path) -> None:
    where = place(sc.COMPETITORS["PyTorch, full"], {}, quick=False)
    assert where.interpreter == Path(sys.executable)
    assert "pytorch is not there" in where.note
    with pytest.raises(FileNotFoundError, match="python -m benchmarks setup onnxruntime"):
        place(sc.COMPETITORS[sc.REFERENCE], {}, quick=False)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        place(sc.COMPETITORS["PyTorch, full"], {environments.PYTORCH: bare / "python"}, quick=True)
    assert "onnxruntime is not there" in place(sc.COMPETITORS[sc.REFERENCE], {}, quick=True).note


class _Folder:
    """A case that only makes its folder."""

    def __init__(self, model: str, folder: Path, *, spec: InputSpec) -> None:
        self.model, self.folder, self.spec = model, folder, spec
        folder.mkdir()


def test_a_network_is_kept_until_another_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_cases, "Case", _Folder)
    with Cases() as cases:
        first = cases.of("resnet20", SIZE)
        assert cases.of("resnet20", SIZE) is first
        assert cases.of("resnet20", 16).spec.shape == (3, 16, 16)
        assert not first.folder.exists()
        last = cases.of("resnet32", 16)
    assert not last.folder.exists()


def test_a_worker_that_is_over_says_so() -> None:
    with Worker(Path(sys.executable), "benchmarks.no_such_module") as worker:
        with pytest.raises(WorkerError):
            worker.ask("hello")
        assert worker.ended
