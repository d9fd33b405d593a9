"""The state file: everything comes back, and what is damaged or of another run is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from training_cases import equal

from lorac_deploy.training_report import EpochRecord
from lorac_deploy.training_state import (
    FORMAT,
    RunFacts,
    TrainingState,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from lorac_runtime.errors import CheckpointError

WHO = {"method": "full", "epochs": "3"}
HISTORY = (EpochRecord(1, 0.5, None, None, 1.25), EpochRecord(2, 0.25, 0.5, 0.75, 1.5))


def example() -> TrainingState:
    model = {"conv.weight": torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last), "n": torch.tensor(7)}
    optimizer = {"conv.weight": {"step": torch.tensor(4.0), "exp_avg": torch.randn(2, 3, 3, 3)}}
    return TrainingState(RunFacts(FORMAT, WHO, HISTORY, 2, 0.5), model, {"conv.weight": torch.ones(2)}, optimizer)


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = example()
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state", WHO)
    assert found.facts == state.facts
    assert equal(found.model, state.model)
    assert equal(found.kept, state.kept)
    assert equal(found.optimizer["conv.weight"], state.optimizer["conv.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("who", [WHO | {"epochs": "4"}, {"method": "full"}, WHO | {"seed": "1"}])
def test_another_run_is_refused_with_its_differences(tmp_path: Path, who: dict[str, str]) -> None:
    save_state(tmp_path / "state", example())
    key = next(k for k in {**WHO, **who} if WHO.get(k) != who.get(k))
    with pytest.raises(CheckpointError, match=rf"(?s)--restart.*- {key} was {WHO.get(key)}, now {who.get(key)}"):
        load_state(tmp_path / "state", who)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "state"
    save_state(path, example())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"state is damaged .*--restart"):
        load_state(path, WHO)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (None, "not a state of this version"),
        ("{", "is damaged"),
        (json.dumps(dataclasses.asdict(dataclasses.replace(example().facts, format="old"))), "not a state of this"),
        (json.dumps({"format": FORMAT}), "identity: missing"),
    ],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, facts: str | None, text: str) -> None:
    metadata = {} if facts is None else {"facts": facts}
    safetensors.torch.save_file({"model/x": torch.zeros(1)}, tmp_path / "state", metadata)
    with pytest.raises(CheckpointError, match=f"(?s){text}"):
        load_state(tmp_path / "state", WHO)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_from_what_it_remembered(kind: type[torch.optim.Optimizer]) -> None:
    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = torch.sin(parameter.detach())
        optimizer.step()

    first = nn.Parameter(torch.arange(54.0).reshape(2, 3, 3, 3).to(memory_format=torch.channels_last))
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizer = kind([first], **options)
    step(first, optimizer)
    second = nn.Parameter(first.detach().clone())
    other = kind([second], **options)
    saved = optimizer_tensors(optimizer, {first: "w"})
    as_in_a_file = {key: value.contiguous() for key, value in saved["w"].items()}
    restore_optimizer(other, {second: "w"}, {"w": as_in_a_file})
    step(first, optimizer)
    step(second, other)
    assert torch.equal(first, second)
    memory = [v for v in other.state[second].values() if v.ndim == 4]
    assert memory
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in memory)


def test_what_the_optimizer_remembers_is_copied() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer_tensors(optimizer, {parameter: "w"})
    optimizer.step()
    assert saved["w"]["momentum_buffer"].tolist() == [1, 1]
