"""A model that stays in place: what is accepted, what is not, and what the state folder holds then."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import Tiny, build
from finetune_runs import StopError, contents, normalised, run_onnx, stop_at, write_data
from tiny_network import CLASSES, Recipe, W

from lorac_runtime import manifest as mf
from lorac_runtime import state as states
from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import stratified_split
from lorac_runtime.errors import BusyError, DataError, OutputError, StateError, StoppedError
from lorac_runtime.files import locked
from lorac_runtime.gate import GateConfig
from lorac_runtime.session import finetune

CONFIG = FinetuneConfig(epochs=4, lr=0.01, threads=1)
FILES = ("adapter.safetensors", "fused.onnx")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz", 300)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def altered(data: Path, target: Path, **changes: object) -> Path:
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(target, **arrays)
    return target


def test_honest_data_are_accepted_and_the_new_model_is_in_place(tiny: Tiny, data: Path, state: Path) -> None:
    found = adapt(tiny.folder, data, state, CONFIG)
    assert found.verdict.accepted, found.verdict.reasons
    assert (found.generation, found.repeated) == (1, False)
    plain = finetune(tiny.folder, data, state.parent / "plain", CONFIG)
    assert found.report is not None
    assert found.report.losses == plain.losses
    for name in FILES:
        assert (state / name).read_bytes() == (state.parent / "plain" / name).read_bytes()
    assert states.status(state).current == 1
    assert not (state / "attempt").exists()


def test_the_figures_are_those_of_the_files_on_the_held_out_samples(tiny: Tiny, data: Path, state: Path) -> None:
    verdict = adapt(tiny.folder, data, state, CONFIG).verdict
    with np.load(data) as file:
        _, index = stratified_split(file["labels"], CONFIG.val_fraction, CONFIG.seed)
        images, labels = normalised(file["images"][index]), file["labels"][index]
    assert verdict.held_out == len(index) == 60
    for number, accuracy in ((0, verdict.before), (1, verdict.after)):
        logits = run_onnx(state / "generations" / f"{number:04}" / "fused.onnx", images)
        assert np.mean(logits.argmax(axis=1) == labels) == accuracy


def test_before_anything_is_accepted_the_base_is_in_place(tiny: Tiny, data: Path, state: Path) -> None:
    found = adapt(tiny.folder, data, state, dataclasses.replace(CONFIG, epochs=1, lr=1e-9))
    assert not found.verdict.accepted
    assert (found.generation, found.report) == (0, None)
    assert (state / "fused.onnx").read_bytes() == (tiny.folder / "base.onnx").read_bytes()
    assert sorted(p.name for p in state.iterdir()) == [
        "adapter.safetensors", "current", "fused.onnx", "generations", "rejected.json", "state.json"
    ]  # fmt: skip


def garbage(kind: str, data: Path, target: Path) -> Path:
    rng = np.random.default_rng(6)

    def wrong(labels: np.ndarray) -> np.ndarray:
        flipped = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
        return np.where(rng.random(len(labels)) < 0.4, flipped, labels)

    changes = {
        "wrong labels": {"labels": wrong},
        "constant images": {"images": lambda images: np.full_like(images, 7)},
        "constant images, one class most": {
            "images": lambda images: np.full_like(images, 7),
            "labels": lambda labels: np.where(np.arange(len(labels)) % 10 == 0, labels, 1),
        },
        "noise": {"images": lambda images: rng.integers(0, 256, images.shape).astype(np.uint8)},
    }
    return altered(data, target, **changes[kind])


@pytest.mark.parametrize("kind", ["wrong labels", "constant images", "constant images, one class most", "noise"])
@pytest.mark.parametrize("begun", ["from the base", "from a good model"])
def test_garbage_is_never_accepted(tiny: Tiny, data: Path, state: Path, tmp_path: Path, kind: str, begun: str) -> None:
    if begun == "from a good model":
        assert adapt(tiny.folder, data, state, CONFIG).verdict.accepted
    number = states.status(state).current if begun == "from a good model" else 0
    for seed in range(3):
        found = adapt(
            tiny.folder, garbage(kind, data, tmp_path / "bad.npz"), state, dataclasses.replace(CONFIG, seed=seed)
        )
        assert not found.verdict.accepted
        assert found.verdict.reasons
        assert found.generation == states.status(state).current == number
    assert (state / "fused.onnx").resolve() == (state / f"generations/{number:04}/fused.onnx").resolve()


def test_one_class_alone_is_refused_and_changes_nothing(tiny: Tiny, data: Path, state: Path, tmp_path: Path) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    before = contents(state)
    one = altered(data, tmp_path / "one.npz", labels=np.zeros_like)
    with pytest.raises(DataError, match="are of class"):
        adapt(tiny.folder, one, state, CONFIG)
    assert contents(state) == before


@pytest.mark.parametrize("factor", [1000.0, 1e30])
def test_a_learning_rate_far_too_high_is_not_accepted(tiny: Tiny, data: Path, state: Path, factor: float) -> None:
    first = adapt(tiny.folder, data, state, CONFIG)
    kept = {name: (state / name).read_bytes() for name in FILES}
    found = adapt(tiny.folder, data, state, dataclasses.replace(CONFIG, lr=0.01 * factor))
    assert first.verdict.accepted
    assert not found.verdict.accepted
    assert "diverged" in found.verdict.reasons[0] or found.verdict.gain is not None
    assert {name: (state / name).read_bytes() for name in FILES} == kept
    assert not (state / "attempt").exists()


def test_training_starts_from_the_model_in_place(tiny: Tiny, data: Path, state: Path, tmp_path: Path) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    more = write_data(tmp_path / "more.npz", 300, seed=1)
    adapt(tiny.folder, more, state, dataclasses.replace(CONFIG, lr=1e-9))  # not accepted: nothing learned
    adapter = state / "generations/0001/adapter.safetensors"
    plain = finetune(tiny.folder, more, tmp_path / "plain", dataclasses.replace(CONFIG, lr=1e-4), adapter=adapter)
    shown: list[float] = []
    adapt(tiny.folder, more, state, dataclasses.replace(CONFIG, lr=1e-4), on_progress=lambda p: shown.append(p.loss))
    assert shown[0] == plain.losses[0]


def test_the_same_attempt_is_not_made_twice(
    tiny: Tiny, data: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = adapt(tiny.folder, data, state, CONFIG)
    before = contents(state)
    with caplog.at_level(logging.INFO):
        again = adapt(tiny.folder, data, state, CONFIG)
    assert "made before" in caplog.text
    assert (again.verdict, again.generation, again.repeated) == (first.verdict, 1, True)
    assert contents(state) == before
    rejected = dataclasses.replace(CONFIG, epochs=1, lr=1e-9)
    assert not adapt(tiny.folder, data, state, rejected).repeated
    assert adapt(tiny.folder, data, state, rejected).repeated
    assert not adapt(tiny.folder, data, state, dataclasses.replace(rejected, restart=True)).repeated


def test_an_attempt_that_was_cut_off_goes_on(
    tiny: Tiny, data: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StopError):
        adapt(tiny.folder, data, state, CONFIG, on_progress=stop_at(70))  # 30 steps an epoch
    assert states.status(state).unfinished == 60
    assert (state / "fused.onnx").read_bytes() == (tiny.folder / "base.onnx").read_bytes()
    with caplog.at_level(logging.INFO):
        found = adapt(tiny.folder, data, state, CONFIG)
    assert "resuming after epoch 2 of 4" in caplog.text
    plain = finetune(tiny.folder, data, state.parent / "plain", CONFIG)
    assert found.report is not None
    assert found.report.losses == plain.losses
    assert (state / "adapter.safetensors").read_bytes() == (state.parent / "plain/adapter.safetensors").read_bytes()


def test_an_attempt_with_other_data_begins_anew(
    tiny: Tiny, data: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StopError):
        adapt(tiny.folder, data, state, CONFIG, on_progress=stop_at(70))
    other = write_data(tmp_path / "other.npz", 300, seed=1)
    found = adapt(tiny.folder, other, state, CONFIG)
    assert "begins anew" in caplog.text
    assert found.report is not None
    assert len(found.report.losses) == 120


def test_time_that_is_up_stops_at_a_checkpoint(tiny: Tiny, data: Path, state: Path) -> None:
    large = dataclasses.replace(CONFIG, batch_size=60)  # four steps an epoch
    hurried = dataclasses.replace(large, time_budget=1e-3)
    for step in range(1, 16):  # all but the last, which ends training
        with pytest.raises(StoppedError, match=f"the time is up after step {step};"):
            adapt(tiny.folder, data, state, hurried)
    found = adapt(tiny.folder, data, state, hurried)
    plain = finetune(tiny.folder, data, state.parent / "plain", large)
    assert found.report is not None
    assert found.report.losses == plain.losses
    assert (state / "adapter.safetensors").read_bytes() == (state.parent / "plain/adapter.safetensors").read_bytes()


def test_generations_are_kept_and_rolled_back(tiny: Tiny, data: Path, state: Path, tmp_path: Path) -> None:
    """Each time the brightness means another class, so that there is something to learn."""
    for turn in range(1, 6):
        turned = altered(data, tmp_path / f"{turn}.npz", labels=lambda labels, turn=turn: (labels + turn) % CLASSES)
        found = adapt(tiny.folder, turned, state, dataclasses.replace(CONFIG, epochs=8), keep=3)
        assert found.verdict.accepted, found.verdict.reasons
        assert found.generation == turn
    assert [kept.number for kept in states.status(state).kept] == [3, 4, 5]
    whole = contents(state)
    assert states.rollback(state) == (5, 4)
    assert (state / "fused.onnx").read_bytes() == whole["generations/0004/fused.onnx"]
    assert states.rollback(state) == (4, 3)
    with pytest.raises(StateError, match="generation 2, which 3 was made from, is not kept"):
        states.rollback(state)
    assert states.rollback(state, to=5) == (3, 5)
    assert contents(state) == whole


def with_anchors(source: Path, target: Path, data: Path) -> Path:
    """The artifact with the first samples of a file packed into it."""
    shutil.copytree(source, target)
    with np.load(data) as file:
        np.savez(target / mf.ANCHORS, images=file["images"][:60], labels=file["labels"][:60])
    entry = mf.FileEntry(mf.sha256(target / mf.ANCHORS), (target / mf.ANCHORS).stat().st_size)
    manifest = mf.load(target)
    files = {**manifest.files, mf.ANCHORS: entry}
    (target / mf.FILE_NAME).write_text(dataclasses.replace(manifest, files=files).to_json())
    return target


def test_what_the_artifact_must_not_forget_is_not_given_up(tiny: Tiny, data: Path, state: Path, tmp_path: Path) -> None:
    """Labels that mean something else are learned well, at the expense of the anchors."""
    artifact = with_anchors(tiny.folder, tmp_path / "a", data)
    first = adapt(artifact, data, state, CONFIG).verdict
    assert first.accepted, first.reasons
    assert first.anchors_after == pytest.approx(1.0, abs=0.05)
    turned = altered(data, tmp_path / "turned.npz", labels=lambda labels: (labels + 1) % CLASSES)
    longer = dataclasses.replace(CONFIG, epochs=8)
    second = adapt(artifact, turned, state, longer)
    assert second.generation == 1
    assert len(second.verdict.reasons) == 1
    assert "accuracy on the artifact's anchors fell from" in second.verdict.reasons[0]
    third = adapt(artifact, turned, state, longer, GateConfig(anchor_loss=1.0))
    assert third.verdict.accepted


def test_a_damaged_accepted_attempt_is_given_up(
    tiny: Tiny, data: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    (state / "attempt").mkdir()
    (state / "attempt/generation.json").write_text("{")
    assert adapt(tiny.folder, data, state, CONFIG).repeated
    assert "is damaged and given up" in caplog.text
    assert not (state / "attempt").exists()


def test_after_a_rollback_the_next_generation_starts_from_the_one_in_place(
    tiny: Tiny, data: Path, state: Path, tmp_path: Path
) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    states.rollback(state)
    assert (state / "fused.onnx").read_bytes() == (tiny.folder / "base.onnx").read_bytes()
    assert adapt(tiny.folder, data, state, CONFIG).repeated  # it is not smuggled in again
    assert states.status(state).current == 0
    other = write_data(tmp_path / "other.npz", 300, seed=1)
    assert adapt(tiny.folder, other, state, CONFIG).generation == 2
    assert [(kept.number, kept.parent) for kept in states.status(state).kept] == [(0, None), (2, 0)]


def test_what_killed_processes_left_beside_is_removed_and_nothing_else(tiny: Tiny, data: Path, state: Path) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    before = sorted(state.rglob("*"))
    for name in (".state.json.77.part", ".rejected.json.1.part", ".command.json.123.part"):
        (state / name).write_bytes(b"{")
    for name in (".current.9.part", ".fused.onnx.9.part"):
        (state / name).symlink_to("generations/0000")
    (state / ".notes.part").write_bytes(b"mine")
    adapt(tiny.folder, data, state, CONFIG)
    assert sorted(state.rglob("*")) == sorted([*before, state / ".notes.part"])


def test_a_kill_while_it_is_written_down_what_was_accepted_leads_to_no_second_attempt(
    tiny: Tiny, data: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, an attempt was rejected: what is known of that must not hide the accepted one."""
    wrong = altered(data, tmp_path / "wrong.npz", labels=lambda values: np.random.default_rng(0).permutation(values))
    assert not adapt(tiny.folder, wrong, state, CONFIG).verdict.accepted
    write = states.gen.write_record

    def written_then_stopped(*arguments: Any) -> None:
        write(*arguments)
        raise StopError

    monkeypatch.setattr(states.gen, "write_record", written_then_stopped)
    with pytest.raises(StopError):
        adapt(tiny.folder, data, state, CONFIG)
    monkeypatch.undo()
    found = adapt(tiny.folder, data, state, CONFIG)
    assert (found.repeated, found.generation) == (True, 1)


def test_a_generation_holds_nothing_that_a_kill_left(
    tiny: Tiny, data: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = states.gen.describe

    def littered(home: Path, *rest: Any) -> None:
        (home / "checkpoint/step-9").mkdir(parents=True)
        (home / "checkpoint/step-9/training_state.safetensors").write_bytes(b"half")
        (home / ".report.json.5.part").write_bytes(b"{")
        describe(home, *rest)

    monkeypatch.setattr(states.gen, "describe", littered)
    adapt(tiny.folder, data, state, CONFIG)
    there = {path.name for path in (state / "generations/0001").iterdir()}
    assert there == {*FILES, "generation.json", "report.json"}


def test_two_processes_do_not_share_a_state(tiny: Tiny, data: Path, state: Path) -> None:
    state.mkdir()
    with locked(state), pytest.raises(BusyError, match="in use by another process"):
        adapt(tiny.folder, data, state, CONFIG)
    assert list(state.iterdir()) == []


def test_what_is_no_state_is_refused(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    finetune(tiny.folder, data, tmp_path / "plain", CONFIG)
    before = contents(tmp_path / "plain")
    with pytest.raises(OutputError, match="of a run without --keep-if-better"):
        adapt(tiny.folder, data, tmp_path / "plain", CONFIG)
    assert contents(tmp_path / "plain") == before
    with pytest.raises(StateError, match="is no state folder"):
        states.rollback(tmp_path / "plain")


def test_another_artifact_is_refused(tiny: Tiny, data: Path, state: Path, tmp_path: Path) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    before = contents(state)
    other = build(tmp_path / "b", Recipe(seed=1))
    with pytest.raises(StateError, match="belongs to another base"):
        adapt(other.folder, data, state, CONFIG)
    assert contents(state) == before


def test_samples_without_labels_cannot_be_judged(tmp_path: Path, data: Path, state: Path) -> None:
    tiny = build(tmp_path / "a", Recipe())
    with pytest.raises(DataError, match="no samples are held out"):
        adapt(tiny.folder, data, state, dataclasses.replace(CONFIG, val_fraction=0.0))


@pytest.mark.parametrize("damage", ["fused.onnx", "generation.json", "link", "state.json"])
def test_damage_is_told(tiny: Tiny, data: Path, state: Path, damage: str) -> None:
    adapt(tiny.folder, data, state, CONFIG)
    home = state / "generations/0001"
    if damage == "link":
        (state / "current").unlink()
        (state / "current").symlink_to("../elsewhere")
    else:
        path = state / damage if damage == "state.json" else home / damage
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StateError, match=r"damaged|leads to|cannot be read|state\.json"):
        adapt(tiny.folder, data, state, dataclasses.replace(CONFIG, seed=5))


def test_images_of_another_size_are_refused_as_ever(tiny: Tiny, state: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=np.zeros((9, W + 1, W, 3), np.uint8), labels=np.arange(9) % CLASSES)
    with pytest.raises(DataError, match="have shape"):
        adapt(tiny.folder, tmp_path / "bad.npz", state, CONFIG)
