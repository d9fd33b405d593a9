"""The engine's state: out and in again, saved and restored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_cases import Make, batch, distance, engine_of, maker

from lorac_runtime.engines.training_state import FILE_NAME
from lorac_runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(
    make: Make, policy: str, clip: float, tmp_path: Path
) -> None:
    tiny = make(bn_policy=policy, lora_b=1.0, clip_norm=clip)
    whole = engine_of(tiny)
    if policy == "recalibrate":
        whole.recalibrate([batch(8)[0]])
    expected = [whole.train_step(*batch(8, i), 0.01 / (i + 1)) for i in range(3)]
    whole.save(tmp_path)
    expected += [whole.train_step(*batch(6, i), 0.02) for i in range(3, 7)]
    resumed = engine_of(tiny)
    resumed.train_step(*batch(4, 9), 0.5)  # whatever it did before must be forgotten
    resumed.restore(tmp_path)
    found = [resumed.train_step(*batch(6, i), 0.02) for i in range(3, 7)]
    x, y = batch(5)
    logits = resumed.eval_step(x, y)[1], whole.eval_step(x, y)[1]
    if clip:  # the library adds up the gradients' norm in an order that differs between two sessions
        assert found == pytest.approx(expected[3:], rel=1e-5)
        assert distance(*logits) < 1e-4
        return
    assert found == expected[3:]
    assert np.array_equal(*logits)
    assert all(np.array_equal(v, whole.state()[k]) for k, v in resumed.state().items())


def test_optimizer_memory_is_part_of_what_is_restored(make: Make, tmp_path: Path) -> None:
    """The control of the test above: weights alone do not continue the run."""
    tiny = make(lora_b=1.0)
    whole, weights_only = engine_of(tiny), engine_of(tiny)
    for i in range(3):
        whole.train_step(*batch(8, i), 0.01)
    weights_only.load_state(whole.state())
    for engine in (whole, weights_only):
        engine.train_step(*batch(8, 5), 0.01)
    assert distance(whole.state()["fc.weight"], weights_only.state()["fc.weight"]) > 1e-4


@pytest.mark.parametrize("damage", ["truncated", "absent", "garbage"])
def test_a_damaged_checkpoint_is_refused(make: Make, damage: str, tmp_path: Path) -> None:
    engine = engine_of(make())
    engine.save(tmp_path)
    path = tmp_path / FILE_NAME
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else b"x" * 500)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.restore(tmp_path)


def test_a_state_before_the_first_step_and_one_of_sgd_are_restored_too(make: Make, tmp_path: Path) -> None:
    """The library's own file has no place for the number of steps while it is 0, and none for what SGD remembers."""
    for optimizer in ("adamw", "sgd"):
        tiny = make(lora_b=1.0, clip_norm=0.0, optimizer=optimizer)
        fresh, resumed = engine_of(tiny), engine_of(tiny)
        fresh.save(tmp_path)
        resumed.train_step(*batch(4, 9), 0.5)
        resumed.restore(tmp_path)
        again = engine_of(tiny)
        again.restore(tmp_path)
        expected = [fresh.train_step(*batch(6, i), 0.02) for i in range(3)]
        for engine in (resumed, again):
            assert [engine.train_step(*batch(6, i), 0.02) for i in range(3)] == expected
            assert all(np.array_equal(v, fresh.state()[k]) for k, v in engine.state().items())


def test_a_state_leaves_nothing_else_behind(make: Make, tmp_path: Path) -> None:
    engine = engine_of(make())
    engine.save(tmp_path)
    engine.restore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_state_goes_out_and_in_again_unchanged(make: Make, policy: str) -> None:
    tiny = make(bn_policy=policy, lora_b=1.0)
    trained, fresh = engine_of(tiny), engine_of(tiny)
    if policy == "recalibrate":
        trained.recalibrate([batch(8)[0] * 2])
    for i in range(3):
        trained.train_step(*batch(8, i), 0.05)
    state = trained.state()
    fresh.load_state(state)
    x, y = batch(6)
    assert all(np.array_equal(v, state[k]) for k, v in fresh.state().items())
    assert distance(fresh.eval_step(x, y)[1], trained.eval_step(x, y)[1]) < 1e-6
    state["fc.weight"][:] = 0  # a copy: the engine does not see this
    assert np.any(trained.state()["fc.weight"])


def test_load_state_names_everything_that_does_not_belong(make: Make) -> None:
    with pytest.raises(ValueError, match="not a state of this model") as caught:
        engine_of(make()).load_state({"bn1.running_mean": np.zeros(6), "fc.bias": np.zeros(5)})
    for line in ("fc.weight is missing", "bn1.running_mean is unknown", "fc.bias has shape (5,), expected (3,)"):
        assert line in str(caught.value)
