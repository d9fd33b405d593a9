"""The state of a run after an epoch, in one file: model, optimizer, kept weights, history.

One file and one rename, so that a run killed at any moment leaves a whole state. It is a safetensors file (no
pickle); everything but the tensors is JSON in its metadata. Names: ``model/...``, ``kept/...`` and
``optimizer/<parameter>/<key>``.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorac_deploy.training_report import EpochRecord
from lorac_runtime.errors import CheckpointError, listed
from lorac_runtime.files import atomic_write
from lorac_runtime.schema import decode

STATE = "training_state.safetensors"
FORMAT = "lorac-training-state-1"
ADVICE = "Begin anew (--restart) or choose another output folder"
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """All of a state but its tensors. ``identity`` is what must be equal to go on (settings, data, network)."""

    format: str
    identity: dict[str, str]
    history: tuple[EpochRecord, ...]
    kept_epoch: int
    accuracy_before: float | None


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """``kept`` is empty where the kept weights are those of ``model``."""

    facts: RunFacts
    model: Tensors
    kept: Tensors
    optimizer: dict[str, Tensors]


def save_state(path: Path, state: TrainingState) -> None:
    """Write the state; the file is the old one or the new one, whatever happens. Raises OutputError."""
    tensors = {f"model/{name}": value for name, value in state.model.items()}
    tensors |= {f"kept/{name}": value for name, value in state.kept.items()}
    for parameter, values in state.optimizer.items():
        tensors |= {f"optimizer/{parameter}/{key}": value for key, value in values.items()}
    metadata = {"facts": json.dumps(dataclasses.asdict(state.facts))}
    plain = {name: value.detach().contiguous() for name, value in tensors.items()}
    atomic_write(path, safetensors.torch.save(plain, metadata))


def load_state(path: Path, identity: Mapping[str, str]) -> TrainingState:
    """Read a state of a run with this very ``identity``.

    Raises CheckpointError if it cannot be read, or listing what is another than in that run.
    """
    tensors, facts = _read(path)
    different = [
        f"{key} was {facts.identity.get(key)}, now {identity.get(key)}"
        for key in {**facts.identity, **identity}
        if facts.identity.get(key) != identity.get(key)
    ]
    if different:
        raise CheckpointError(listed(f"{path} is of an interrupted run that was another one. {ADVICE}:", different))
    optimizer: dict[str, Tensors] = {}
    for name, value in _below("optimizer/", tensors).items():
        parameter, _, key = name.rpartition("/")
        optimizer.setdefault(parameter, {})[key] = value
    return TrainingState(facts, _below("model/", tensors), _below("kept/", tensors), optimizer)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensors]:
    """Copies of what the optimizer remembers, by parameter name; `restore_optimizer` puts it back."""
    return {
        name: {key: value.detach().clone() for key, value in optimizer.state[parameter].items()}
        for parameter, name in names.items()
        if parameter in optimizer.state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], saved: Mapping[str, Tensors]
) -> None:
    """Give the optimizer what `optimizer_tensors` returned, in each parameter's own memory format."""
    for parameter, name in names.items():
        for key, value in saved.get(name, {}).items():
            same = value.shape == parameter.shape
            optimizer.state[parameter][key] = torch.empty_like(parameter.data).copy_(value) if same else value


def _read(path: Path) -> tuple[Tensors, RunFacts]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the handle is no mapping
            raw: Any = json.loads((file.metadata() or {}).get("facts", "null"))
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError, struct.error) as err:
        raise CheckpointError(f"{path} is damaged ({err}). {ADVICE}") from err
    problems: list[str] = []
    facts = decode(RunFacts, raw, "", problems)
    if facts is None or facts.format != FORMAT:
        raise CheckpointError(listed(f"{path} is not a state of this version. {ADVICE}:", problems))
    return tensors, facts


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
