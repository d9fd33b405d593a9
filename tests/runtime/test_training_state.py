"""The training state on disk: everything comes back, and what does not belong is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorac_runtime.engines.training_state import FILE_NAME, TrainingState, check_memory, checked_tensors, read, write
from lorac_runtime.errors import CheckpointError, EngineError

TENSORS = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.ones(2, np.float32)}
STATE = TrainingState(TENSORS, {"exp_avg": TENSORS, "exp_avg_sq": {n: v**2 for n, v in TENSORS.items()}}, 7)
SHAPES = {n: v.shape for n, v in TENSORS.items()}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, STATE)
    found = read(tmp_path)
    assert found.step == 7
    assert found.memory.keys() == STATE.memory.keys()
    for one, other in ((found.parameters, TENSORS), *((found.memory[s], STATE.memory[s]) for s in STATE.memory)):
        assert one.keys() == other.keys()
        assert all(np.array_equal(v, other[n]) for n, v in one.items())


def test_the_file_holds_everything_by_tensor_name(tmp_path: Path) -> None:
    transposed = np.arange(6, dtype=np.float32).reshape(3, 2).T  # not contiguous: must not come back as another one
    write(tmp_path, TrainingState({"w": transposed}, {"momentum": {"w": transposed}}, 1))
    found = load_file(tmp_path / FILE_NAME)
    assert found.keys() == {"w", "momentum:w", "step"}
    assert np.array_equal(found["w"], transposed)
    assert np.array_equal(found["momentum:w"], transposed)


def test_a_folder_that_cannot_be_written_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be written"):
        write(tmp_path / "absent", STATE)


@pytest.mark.parametrize("damage", ["absent", "truncated", "garbage"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path, STATE)
    path = tmp_path / FILE_NAME
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(content[:-9] if damage == "truncated" else b"x" * 500)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": np.array(3.0, np.float32)}, "it has no count of steps"),
        ({"step": np.array([3])}, "it has no count of steps"),
        ({"step": np.array(-1)}, "it has no count of steps"),
        ({"fc.bias": np.ones(2, np.float64)}, "fc.bias is float64, expected float32"),
        ({"exp_avg:fc.bias": np.ones(2, np.int32)}, "exp_avg:fc.bias is int32, expected float32"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    write(tmp_path, STATE)
    save_file(load_file(tmp_path / FILE_NAME) | change, tmp_path / FILE_NAME)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_memory_of_another_optimizer_or_shape_is_refused_with_all_mismatches() -> None:
    check_memory(STATE, ("exp_avg", "exp_avg_sq"), SHAPES)
    with pytest.raises(CheckpointError) as caught:
        check_memory(STATE, ("exp_avg", "momentum"), SHAPES | {"fc.bias": (4,), "new": (1,)})
    for line in (
        "momentum:fc.weight is missing",
        "exp_avg:new is missing",
        "exp_avg_sq:fc.bias is unknown to this optimizer",
        "exp_avg:fc.bias has shape (2,), expected (4,)",
    ):
        assert line in str(caught.value)


def test_tensors_that_cannot_be_set_must_be_equal() -> None:
    fixed = {"lora_a": np.ones(3, np.float32)}
    whole = TENSORS | fixed
    found = checked_tensors(
        {n: v.astype(np.float64) for n, v in whole.items()}, whole, needed=list(TENSORS), fixed=fixed
    )
    assert found.keys() == TENSORS.keys()
    assert all(v.dtype == np.float32 for v in found.values())
    with pytest.raises(ValueError, match="lora_a does not train in this artifact"):
        checked_tensors(whole | {"lora_a": np.zeros(3)}, whole, needed=[], fixed=fixed)
    with pytest.raises(ValueError, match=r"lora_a has shape \(2,\), expected \(3,\)$"):
        checked_tensors(whole | {"lora_a": np.ones(2)}, whole, needed=[], fixed=fixed)
