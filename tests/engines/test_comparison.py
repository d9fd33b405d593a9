"""The comparison that `make test-engines` rests on notices what it is there for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from artifacts import build
from engines.cases import CASES
from engines.comparison import CHANGE, LOSS, Outcome, compare, read, version_problem
from safetensors.numpy import load_file, save_file

VERSIONS = {"python": "3.13.0", "onnxruntime": "1.31.1", "numpy": "2.5.5"}
CHANGES = {"a": np.array([3.0, 4.0]), "b": np.zeros(2)}
RUN = Outcome((2.0, 1.0), CHANGES, VERSIONS, 0.1)


def test_a_run_agrees_with_itself() -> None:
    assert compare(RUN, RUN).ok
    assert (compare(RUN, RUN).loss, compare(RUN, RUN).change) == (0, 0)


@pytest.mark.parametrize("step", [0, 1])
def test_a_loss_of_any_step_that_is_off_is_noticed(step: int) -> None:
    losses = list(RUN.losses)
    losses[step] *= 1 + 2 * LOSS
    found = compare(dataclasses.replace(RUN, losses=tuple(losses)), RUN)
    assert not found.ok
    assert found.loss == pytest.approx(2 * LOSS)


def test_a_tensor_whose_change_is_off_is_noticed_by_its_norm() -> None:
    found = compare(dataclasses.replace(RUN, changes=CHANGES | {"a": CHANGES["a"] + [0, 10 * CHANGE]}), RUN)
    assert not found.ok
    assert (found.tensor, found.change) == ("a", pytest.approx(2 * CHANGE))


def test_a_tensor_that_should_not_change_is_noticed() -> None:
    found = compare(dataclasses.replace(RUN, changes=CHANGES | {"b": np.array([0.0, 1e-9])}), RUN)
    assert not found.ok
    assert found.tensor == "b"


def test_nan_is_no_agreement() -> None:
    assert not compare(dataclasses.replace(RUN, losses=(2.0, math.nan)), RUN).ok
    found = compare(dataclasses.replace(RUN, changes=CHANGES | {"a": np.array([math.nan, 0])}), RUN)
    assert (found.ok, found.tensor) == (False, "a")


def test_runs_of_another_kind_are_not_compared() -> None:
    with pytest.raises(ValueError, match="1 steps"):
        compare(dataclasses.replace(RUN, losses=(2.0,)), RUN)
    with pytest.raises(ValueError, match="1 tensors"):
        compare(dataclasses.replace(RUN, changes={"a": CHANGES["a"]}), RUN)


def finished(artifact: Path, out: Path, **changed: np.ndarray) -> None:
    """The files of a run in ``out``; what is not ``changed`` is half a unit from the artifact's start."""
    out.mkdir()
    start = load_file(artifact / "adapter.safetensors")
    metadata = {"format": "lorac-adapter", "schema": "1"}
    tensors = {n: v + np.float32(0.5) for n, v in start.items()}
    save_file(tensors | changed, out / "adapter.safetensors", metadata)
    report = {"losses": [2.0, 1.0], "versions": VERSIONS, "step_seconds": 0.1}
    (out / "report.json").write_text(json.dumps(report))


def test_the_outcome_is_what_changed_since_the_artifact(tmp_path: Path) -> None:
    artifact, out = build(tmp_path / "artifact").folder, tmp_path / "out"
    finished(artifact, out)
    found = read(artifact, out)
    assert (found.losses, found.versions, found.step_seconds) == ((2.0, 1.0), VERSIONS, 0.1)
    assert found.changes.keys() == load_file(artifact / "adapter.safetensors").keys()
    for change in found.changes.values():
        np.testing.assert_allclose(change, 0.5, atol=1e-6)


def test_a_run_in_which_a_layer_did_not_train_is_no_reference(tmp_path: Path) -> None:
    artifact, out = build(tmp_path / "artifact").folder, tmp_path / "out"
    name, value = next(iter(load_file(artifact / "adapter.safetensors").items()))
    finished(artifact, out, **{name: value})
    with pytest.raises(ValueError, match=f"nothing in {name}"):
        read(artifact, out)


@pytest.mark.parametrize(
    "name",
    ["3.13-1.23.2", "3.1-newest", "3.11-newest"],
)
def test_an_environment_with_other_versions_than_its_name_says_is_told(name: str) -> None:
    assert version_problem("3.13-newest", VERSIONS) is None
    problem = version_problem(name, VERSIONS)
    assert problem is not None
    assert problem.startswith(f"{name} holds python 3.13.0, onnxruntime 1.31.1")


def test_the_cases_run_every_kind_of_step_graph() -> None:
    assert {case.config.training.optimizer for case in CASES} == {"adamw", "sgd"}
    assert {case.config.policy for case in CASES} == {"frozen", "batch"}
    assert {case.config.engine for case in CASES} == {"onnxruntime"}
    assert any("--micro-batch" in case.options for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)
