"""A training state on disk, the same for every engine: training_state.safetensors, by tensor name.

Parameters stand under their own names, the optimizer's memory as ``exp_avg:NAME``, ``exp_avg_sq:NAME``,
``max_exp_avg_sq:NAME`` or ``momentum:NAME`` in the tensor's shape, and ``step`` (int64) counts the steps taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import AdapterError, CheckpointError, EngineError, listed

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Memory = dict[str, dict[str, Floats]]  # slot -> tensor name -> value

FILE_NAME = "training_state.safetensors"
COPIES = 4  # of what trains: parameters, and no optimizer remembers more than three values of each
STEP = "step"
SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum")  # what optimizers remember, as in torch.optim


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Parameters by name, the optimizer's memory by slot and name, and the number of steps taken."""

    parameters: dict[str, Floats]
    memory: Memory
    step: int


def write(folder: Path, state: TrainingState) -> None:
    """Write ``folder/training_state.safetensors``. Raises EngineError if that fails."""
    tensors: dict[str, Array] = {n: np.ascontiguousarray(v) for n, v in state.parameters.items()}
    for slot, values in state.memory.items():
        tensors |= {f"{slot}:{n}": np.ascontiguousarray(v) for n, v in values.items()}
    tensors[STEP] = np.array(state.step, np.int64)
    try:
        save_file(tensors, folder / FILE_NAME)
    except (OSError, SafetensorError) as err:
        raise EngineError(f"{folder / FILE_NAME} cannot be written: {err}") from err


def read(folder: Path, most: int | None = None) -> TrainingState:
    """What `write` wrote.

    Raises CheckpointError if the file is missing, damaged, of another kind, or has more than ``most`` bytes.
    """
    path = folder / FILE_NAME
    try:
        tensors = load_adapter(path, most=most).tensors
    except AdapterError as err:
        raise CheckpointError(f"{path} cannot be read: {err}") from err
    step = tensors.pop(STEP, np.array(-1))
    if step.dtype != np.int64 or step.shape != () or step < 0:
        raise CheckpointError(f"{path} is no training state: it has no count of steps")
    wrong = [f"{n} is {v.dtype}, expected float32" for n, v in tensors.items() if v.dtype != np.float32]
    if wrong:
        raise CheckpointError(listed(f"{path} is no training state:", wrong))
    memory: Memory = {slot: {} for slot in SLOTS if any(n.startswith(f"{slot}:") for n in tensors)}
    for slot, values in memory.items():
        for name in [n for n in tensors if n.startswith(f"{slot}:")]:
            values[name.removeprefix(f"{slot}:")] = tensors.pop(name)
    return TrainingState(tensors, memory, int(step))


def check_memory(state: TrainingState, slots: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the optimizer's memory is ``slots`` of tensors with these ``shapes``."""
    expected = {f"{slot}:{n}": shape for slot in slots for n, shape in shapes.items()}
    found = {f"{slot}:{n}": v.shape for slot, values in state.memory.items() for n, v in values.items()}
    problems = [f"{n} is missing" for n in expected if n not in found]
    problems += [f"{n} is unknown to this optimizer" for n in found if n not in expected]
    common = [n for n in expected if n in found and found[n] != expected[n]]
    problems += [f"{n} has shape {found[n]}, expected {expected[n]}" for n in common]
    if problems:
        raise CheckpointError(listed("the checkpoint's optimizer state does not fit the engine:", problems))


def checked_tensors(
    tensors: Mapping[str, Array], current: Mapping[str, Array], *, needed: Sequence[str], fixed: Mapping[str, Array]
) -> dict[str, Floats]:
    """``tensors`` as float32, without the ``fixed`` ones: those that an engine cannot set, and that must be equal.

    ``current`` is the engine's whole state, ``fixed`` included. Raises ValueError listing what is missing of the
    ``needed`` names, unknown names, other shapes and fixed tensors with other values.
    """
    problems = [f"{n} is missing" for n in needed if n not in tensors]
    problems += [f"{n} is unknown" for n in tensors if n not in current]
    known = [n for n in tensors if n in current]
    wrong = [n for n in known if tensors[n].shape != current[n].shape]
    problems += [f"{n} has shape {tensors[n].shape}, expected {current[n].shape}" for n in wrong]
    for name in known:
        if name in fixed and name not in wrong and not np.array_equal(tensors[name], fixed[name]):
            problems.append(
                f"{name} does not train in this artifact and stands in its graphs with other values; "
                "export the artifact again, starting from these (--adapter)"
            )
    if problems:
        raise ValueError(listed("not a state of this model:", problems))
    return {n: v.astype(np.float32) for n, v in tensors.items() if n not in fixed}
