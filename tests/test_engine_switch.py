"""Two engines for one artifact: which one opens, and one going on from what the other saved."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_cases import batch, distance, worst
from hand_steps import StepRecipe
from safetensors.numpy import load_file
from step_artifacts import StepArtifact, add_training_files, build_steps

from lorac_runtime.engines import Engine, open_engine, wheel
from lorac_runtime.engines.training_state import FILE_NAME
from lorac_runtime.errors import CheckpointError, EngineError

PLAIN, TRAINING = "onnxruntime", "onnxruntime-training"
Make = Callable[..., StepArtifact]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts with the files of both engines, each built once."""
    built: dict[StepRecipe, StepArtifact] = {}

    def get(**recipe: object) -> StepArtifact:
        key = StepRecipe(**recipe)
        if key not in built:
            built[key] = add_training_files(build_steps(tmp_path_factory.mktemp("both") / "a", key))
        return built[key]

    return get


def opened(artifact: StepArtifact, engine: str) -> Engine:
    return open_engine(artifact.folder, artifact.manifest, engine=engine, threads=1)


def trained(engine: Engine, steps: range) -> list[float]:
    return [engine.train_step(*batch(8, i), 0.01 / (1 + i)) for i in steps]


@pytest.mark.parametrize("recipe", [{}, {"freeze_a": False}, {"optimizer": "sgd"}])
@pytest.mark.parametrize(("first", "second"), [(PLAIN, TRAINING), (TRAINING, PLAIN)])
def test_one_engine_goes_on_where_the_other_stopped(
    make: Make, recipe: dict[str, object], first: str, second: str, tmp_path: Path
) -> None:
    artifact = make(**recipe)
    whole = opened(artifact, first)
    trained(whole, range(3))
    whole.save(tmp_path)
    other = opened(artifact, second)
    trained(other, range(7, 9))  # must be forgotten
    other.restore(tmp_path)
    at = whole.state()
    assert other.state().keys() == at.keys()
    assert all(np.array_equal(v, at[n]) for n, v in other.state().items())
    assert trained(other, range(3, 8)) == pytest.approx(trained(whole, range(3, 8)), rel=1e-5)
    moved = [{n: v - at[n] for n, v in e.state().items()} for e in (other, whole)]
    assert worst(*moved)[0] < 1e-3  # AdamW: the two correct their bias a little differently
    assert any(np.any(v) for v in moved[0].values())


@pytest.mark.parametrize(("first", "second"), [(PLAIN, TRAINING), (TRAINING, PLAIN)])
def test_the_file_of_one_engine_is_the_file_of_the_other(make: Make, first: str, second: str, tmp_path: Path) -> None:
    one, other = (opened(make(freeze_a=False), name) for name in (first, second))
    trained(one, range(3))
    files = []
    for engine, folder in ((one, tmp_path / "one"), (other, tmp_path / "other")):
        folder.mkdir()
        engine.save(folder)
        files.append(load_file(folder / FILE_NAME))
        other.restore(tmp_path / "one")
    assert files[0].keys() == files[1].keys()
    assert {n.split(":")[0] for n in files[0] if ":" in n} == {"exp_avg", "exp_avg_sq"}
    (tmp_path / "again").mkdir()
    other.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / FILE_NAME)
    assert all(np.array_equal(v, files[0][n]) for n, v in again.items())
    assert again["step"] == 3


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("recipe", [{"clip_norm": 0.05, "amsgrad": True}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(
    policy: str, micro_batch: int | None, recipe: dict[str, object], tmp_path: Path
) -> None:
    """Of the engine onnxruntime, to the last bit, clipping included."""
    artifact = build_steps(tmp_path / "a", StepRecipe(bn_policy=policy, **recipe))
    if policy == "batch":
        micro_batch = None
    options = {"engine": PLAIN, "threads": 1, "micro_batch": micro_batch}
    whole = open_engine(artifact.folder, artifact.manifest, **options)
    if policy == "recalibrate":
        whole.recalibrate([batch(8)[0] * 2])
    trained(whole, range(3))
    whole.save(tmp_path)
    expected = trained(whole, range(3, 8))
    resumed = open_engine(artifact.folder, artifact.manifest, **options)
    trained(resumed, range(7, 9))
    resumed.restore(tmp_path)
    assert trained(resumed, range(3, 8)) == expected
    assert all(np.array_equal(v, whole.state()[n]) for n, v in resumed.state().items())
    assert np.array_equal(resumed.eval_step(*batch(5))[1], whole.eval_step(*batch(5))[1])


def test_weights_alone_do_not_continue_the_run(make: Make) -> None:
    """The control of the test above."""
    whole, weights_only = (opened(make(), PLAIN) for _ in range(2))
    trained(whole, range(3))
    weights_only.load_state(whole.state())
    assert trained(whole, range(3, 6)) != trained(weights_only, range(3, 6))
    assert distance(whole.state()["fc.weight"], weights_only.state()["fc.weight"]) > 1e-4


def test_a_state_that_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    opened(make(optimizer="sgd"), PLAIN).save(tmp_path)
    for engine in (PLAIN, TRAINING):
        with pytest.raises(CheckpointError, match=r"exp_avg:fc.bias is missing"):
            opened(make(), engine).restore(tmp_path)
    momentum = build_steps(tmp_path / "a", StepRecipe(optimizer="sgd", momentum=0.9))
    opened(momentum, PLAIN).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"momentum:fc.bias is unknown to this optimizer"):
        opened(make(optimizer="sgd"), TRAINING).restore(tmp_path)
    opened(make(freeze_a=False), PLAIN).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"exp_avg:hidden.lora_a is unknown"):
        opened(make(), PLAIN).restore(tmp_path)


@pytest.mark.parametrize("engine", [PLAIN, TRAINING])
def test_a_state_with_another_frozen_tensor_is_refused(make: Make, engine: str) -> None:
    one = opened(make(), engine)
    with pytest.raises(ValueError, match=r"(?s)not a state of this model.*hidden.lora_a does not train"):
        one.load_state(one.state() | {"hidden.lora_a": np.ones((2, 3))})


def test_auto_prefers_onnxruntime_and_says_what_it_took(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    artifact = make()
    with caplog.at_level(logging.INFO):
        assert open_engine(artifact.folder, artifact.manifest, threads=1).name == PLAIN
        assert caplog.messages == ["engine onnxruntime"]
        caplog.clear()
        entry = {TRAINING: artifact.manifest.engines[TRAINING]}
        only = dataclasses.replace(artifact.manifest, engines=entry)
        assert open_engine(artifact.folder, only, threads=1).name == TRAINING
    assert caplog.messages == ["engine onnxruntime-training; not onnxruntime: the artifact has no files for it"]


def missing() -> None:
    raise EngineError("it is not installed")


def test_auto_passes_over_a_package_that_is_missing_but_not_a_broken_artifact(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make()
    other = dataclasses.replace(artifact.manifest, trainables=artifact.manifest.trainables[1:])
    with pytest.raises(EngineError, match="does not fit its manifest"):
        open_engine(artifact.folder, other)
    monkeypatch.setattr(wheel, "load_inference", missing)
    with caplog.at_level(logging.INFO):
        assert open_engine(artifact.folder, artifact.manifest, threads=1).name == TRAINING
    assert caplog.messages == ["engine onnxruntime-training; not onnxruntime: it is not installed"]
    with pytest.raises(EngineError, match="it is not installed"):
        opened(artifact, PLAIN)
    monkeypatch.setattr(wheel, "load", missing)
    with pytest.raises(
        EngineError, match=r"(?s)no engine for .*onnxruntime: it is not.*onnxruntime-training: it is not"
    ):
        open_engine(artifact.folder, artifact.manifest)


def test_an_engine_that_was_asked_for_is_taken_or_refused(make: Make) -> None:
    artifact = make()
    for name in (PLAIN, TRAINING):
        engine = opened(artifact, name)
        assert (engine.name, engine.version) == (name, "1.19.2")
        assert math.isfinite(engine.train_step(*batch(4), 0.1))
        entry = {n: e for n, e in artifact.manifest.engines.items() if n != name}
        other = dataclasses.replace(artifact.manifest, engines=entry)
        with pytest.raises(EngineError, match=f"has no files for the engine {name}, only for {next(iter(entry))}"):
            open_engine(artifact.folder, other, engine=name)
    with pytest.raises(ValueError, match="'abacus' is not one of auto, onnxruntime, onnxruntime-training"):
        opened(artifact, "abacus")
