"""Answers of a round: what is broken, foreign or huge is rejected by name, all reasons at once; the others count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet_cases
import numpy as np
import pytest
import task_networks

from lorac_deploy.fleet.judging import MOST_SHARE, Answer, Judge
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_exporters.task_config import TaskConfig
from lorac_runtime.errors import AdapterError, ArtifactError
from lorac_runtime.fleet.device import Place, open_device
from lorac_runtime.fleet.payload import payload_of, to_wire
from lorac_runtime.job import start_of
from lorac_runtime.manifest import Manifest, TrainingDefaults, load

HASH = "a" * 64
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fleet_cases.export(tmp_path_factory.mktemp("judging") / "artifact")


@pytest.fixture(scope="module")
def judge(artifact: Path) -> Judge:
    manifest = load(artifact)
    return Judge(manifest, HASH, payload_of(manifest), start_of(artifact, manifest)[0])


def answer(judge: Judge, client: str = "cam", *, step: float = 0.01, samples: float = 10, **changed: Array) -> Answer:
    """What an honest client sends, ``step`` from where it started, with some tensors put in the place of its own."""
    moved = {name: judge.before[name] + np.float32(step) for name in judge.payload.shapes}
    return Answer(client, {**moved, **changed}, HASH, samples)


def test_honest_answers_count_with_their_samples(judge: Judge) -> None:
    updates, rejected = judge.judged([answer(judge, "a", samples=10), answer(judge, "b", samples=30)])
    assert rejected == []
    assert [(u.client, u.weight) for u in updates] == [("a", 10), ("b", 30)]


def test_everything_that_is_wrong_with_an_answer_is_listed(judge: Judge) -> None:
    names = list(judge.payload.shapes)
    sent = dict(answer(judge).tensors)
    del sent[names[0]]
    sent[names[1]] = np.full_like(sent[names[1]], np.nan)
    sent[names[2]] = np.zeros((1, 1), np.float32)
    sent[names[3]] = sent[names[3]].astype(np.float64)
    sent["images"] = np.zeros((12, 10, 10, 3), np.float32)
    _, [rejected] = judge.judged([Answer("evil", sent, HASH, -1)])
    text = str(rejected)
    assert text.startswith("evil: ")
    size = int(np.prod(judge.payload.shapes[names[1]]))
    for reason in (
        f"{names[0]} is missing",
        "images is unexpected",
        f"{names[1]} has {size} values of {size} that are not finite",
        f"{names[2]} has shape (1, 1), expected",
        f"{names[3]} is float64, expected float32",
        "it says that it has -1 samples",
    ):
        assert reason in text


def test_a_client_of_another_artifact_is_rejected(judge: Judge) -> None:
    _, [rejected] = judge.judged([Answer("old", answer(judge).tensors, "b" * 64, 3)])
    assert "another artifact (manifest bbbbbbbbbbbb, here aaaaaaaaaaaa)" in str(rejected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_enough(judge: Judge, value: float) -> None:
    name = next(iter(judge.payload.shapes))
    bad = answer(judge).tensors[name].copy()
    bad.flat[0] = value
    updates, [rejected] = judge.judged([answer(judge, "good"), answer(judge, "bad", **{name: bad})])
    assert [u.client for u in updates] == ["good"]
    assert f"{name} has 1 values of {bad.size} that are not finite" in str(rejected)


def test_a_huge_change_is_rejected_and_told_beside_the_others(judge: Judge) -> None:
    answers = [answer(judge, name, step=step) for name, step in (("a", 0.01), ("b", 0.012), ("c", 0.009), ("evil", 10))]
    updates, [rejected] = judge.judged(answers)
    assert [u.client for u in updates] == ["a", "b", "c"]
    assert rejected.client == "evil"
    assert "times the median of this round's clients" in str(rejected)
    assert "at most 5 times is accepted" in str(rejected)


def test_a_change_so_large_that_its_norm_overflows_is_rejected(judge: Judge) -> None:
    largest = {name: np.full(shape, np.finfo(np.float32).max) for name, shape in judge.payload.shapes.items()}
    updates, [rejected] = judge.judged([answer(judge, n) for n in "abc"] + [answer(judge, "evil", **largest)])
    assert len(updates) == 3
    assert rejected.client == "evil"


def test_a_client_cannot_buy_the_mean_with_a_number_of_samples(judge: Judge) -> None:
    updates, _ = judge.judged(
        [answer(judge, "a", samples=10), answer(judge, "b", samples=20), answer(judge, "c", samples=1e12)]
    )
    assert [u.weight for u in updates] == [10, 20, MOST_SHARE * 20]


def test_where_nobody_moved_nobody_is_huge(judge: Judge) -> None:
    updates, rejected = judge.judged([answer(judge, name, step=0) for name in "abc"])
    assert len(updates) == 3
    assert rejected == []


def manifest_of(tmp_path: Path, **fields: object) -> Manifest:
    return load(fleet_cases.export(tmp_path / "artifact", **fields))


def test_a_personal_head_does_not_travel_and_is_refused_if_it_does(judge: Judge) -> None:
    payload = payload_of(judge.manifest, personal="head")
    assert payload.personal == ("7.weight",)
    assert set(payload.shapes) | {"7.weight"} == {t.name for t in judge.manifest.trainables}
    other = Judge(judge.manifest, HASH, payload, judge.before)
    _, [rejected] = other.judged([answer(judge)])
    assert "7.weight was to stay on the device" in str(rejected)


def test_moving_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--bn frozen"):
        payload_of(manifest_of(tmp_path, bn_policy="batch"))


def test_other_tasks_than_classification_are_refused_by_both_sides(tmp_path: Path) -> None:
    task, training = TaskConfig("segmentation"), TrainingDefaults()
    artifact = tmp_path / "artifact"
    task_networks.export(artifact, task_networks.unet(), task, training, classes=task_networks.CLASSES)
    with pytest.raises(ArtifactError, match="the task is segmentation"):
        open_device(Place(artifact, tmp_path / "local.npz", tmp_path / "out"))
    with pytest.raises(ArtifactError, match="the task is segmentation"):
        AdapterFedAvg(FleetRules(artifact))


def test_a_head_that_does_not_train_cannot_be_personal(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the last layer does not train"):
        payload_of(manifest_of(tmp_path, method="skip"), personal="head")


def test_a_payload_of_the_head_alone_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing would travel"):
        payload_of(manifest_of(tmp_path, method="head"), personal="head")


def test_float16_halves_the_bytes_and_says_what_it_cannot_hold(judge: Judge) -> None:
    half = payload_of(judge.manifest, numbers="float16")
    assert 2 * half.nbytes == judge.payload.nbytes == 4 * judge.manifest.trained_parameters
    name = next(iter(half.shapes))
    with pytest.raises(AdapterError, match=rf"{name}: its largest value is 1e\+05"):
        to_wire(half, {**judge.before, name: np.full(half.shapes[name], 1e5, np.float32)})
