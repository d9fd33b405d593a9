"""The engine ``onnxruntime`` on step graphs written by hand: its steps against PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import step_artifacts as steps
import torch
from engine_cases import SMOOTH, batch, distance, worst
from step_artifacts import Make, StepArtifact, maker, opened
from tiny_network import EPS, Arrays

from lorac_runtime.errors import DataError, EngineError
from lorac_runtime.patch import fuse

SGD = {"optimizer": "sgd"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


def loss_of(values: dict[str, torch.Tensor], x: np.ndarray, y: np.ndarray, bn: str = "folded") -> torch.Tensor:
    return torch.nn.functional.cross_entropy(steps.logits(values, x, bn), torch.tensor(y))


def names(artifact: StepArtifact) -> list[str]:
    return [t.name for t in artifact.manifest.trainables]


def mode(artifact: StepArtifact) -> str:
    return "train" if artifact.recipe.bn_policy == "batch" else "folded"


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("freeze_a", [True, False])
def test_loss_and_every_gradient_agree_with_pytorch(make: Make, policy: str, freeze_a: bool) -> None:
    artifact = make(bn_policy=policy, freeze_a=freeze_a, **SGD)
    oracle, (x, y) = steps.tensors(artifact), batch(16)
    loss = loss_of(oracle, x, y, mode(artifact))
    loss.backward()
    engine, lr = opened(artifact), 1e4  # so large that the old weights vanish beside the step
    assert engine.train_step(x, y, lr) == pytest.approx(loss.item(), rel=1e-6)
    after = engine.state()
    found = {n: (artifact.start[n] - after[n]) / lr for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


OPTIMIZERS = {
    "adamw": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "adamw clipped": ({"clip_norm": 0.05}, {"weight_decay": 0.0}),
    "amsgrad": ({"amsgrad": True}, {"weight_decay": 0.0, "amsgrad": True}),
    "sgd": ({"clip_norm": 0.05, **SGD}, {}),
    "momentum": ({"momentum": 0.9, **SGD}, {"momentum": 0.9}),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_weights_after_some_steps_agree_with_pytorch(make: Make, case: str, policy: str) -> None:
    recipe, options = OPTIMIZERS[case]
    artifact = make(bn_policy=policy, freeze_a=False, **recipe)
    engine, oracle = opened(artifact), steps.tensors(artifact)
    trained = [oracle[n] for n in names(artifact)]
    kind = torch.optim.SGD if artifact.recipe.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(trained, lr=0.1, **options)
    for step, size in enumerate((16, 16, 5, 9)):
        x, y = batch(size, step)
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (1 + step)
        optimizer.zero_grad()
        loss = loss_of(oracle, x, y, mode(artifact))
        loss.backward()
        if artifact.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, artifact.recipe.clip_norm)
        optimizer.step()
        assert engine.train_step(x, y, lr) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: v - artifact.start[n] for n, v in engine.state().items() if n in names(artifact)}
    assert worst(found, {n: oracle[n].detach().numpy() - artifact.start[n] for n in found})[0] < 1e-4


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_evaluation_agrees_with_pytorch_and_changes_nothing(make: Make, policy: str, micro_batch: int | None) -> None:
    artifact = make(bn_policy=policy)
    if policy == "batch" and micro_batch:
        pytest.skip("refused, see below")
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(7)
    oracle = steps.logits(steps.tensors(artifact), x, "eval" if policy == "batch" else "folded").detach()
    before = engine.state()
    loss, logits = engine.eval_step(x, y)
    assert distance(logits, oracle.numpy()) < SMOOTH
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(oracle, torch.tensor(y)).item(), rel=1e-5)
    assert all(np.array_equal(before[n], v) for n, v in engine.state().items())
    assert before.keys() == artifact.start.keys()
    assert all(np.array_equal(before[n], v) for n, v in artifact.start.items())


def test_running_statistics_under_batch_are_those_of_pytorch(make: Make) -> None:
    artifact = make(bn_policy="batch")
    engine, oracle = opened(artifact), steps.tensors(artifact)
    for step, size in enumerate((8, 2, 16)):
        x, y = batch(size, step)
        steps.logits(oracle, x, "train")
        engine.train_step(x, y, 0.0)
    found = {n: v for n, v in engine.state().items() if "running" in n}
    assert len(found) == 2
    assert worst(found, {n: oracle[n].numpy() for n in found})[0] < 1e-6
    with pytest.raises(DataError, match="bn sees one value per channel in a batch of 1 image"):
        engine.train_step(*batch(1), 0.1)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("recipe", [{"clip_norm": 0.05}, {"momentum": 0.9, "freeze_a": False, **SGD}])
def test_micro_batches_give_what_the_whole_batch_gives(make: Make, micro_batch: int, recipe: dict[str, object]) -> None:
    artifact = make(**recipe)
    whole, parts = opened(artifact), opened(artifact, micro_batch=micro_batch)
    for step in range(4):
        x, y = batch(10, step)  # by 3 or 4: the last piece is smaller
        assert parts.train_step(x, y, 0.05) == pytest.approx(whole.train_step(x, y, 0.05), rel=1e-6)
    found, expected = ({n: v - artifact.start[n] for n, v in e.state().items()} for e in (parts, whole))
    assert worst(found, expected)[0] < SMOOTH
    assert parts.eval_step(x, y)[0] == pytest.approx(whole.eval_step(x, y)[0], rel=1e-5)


def test_micro_batches_are_refused_where_statistics_are_those_of_the_batch(make: Make) -> None:
    with pytest.raises(EngineError, match="micro-batches do not go with BN policy 'batch'"):
        opened(make(bn_policy="batch"), micro_batch=4)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(make: Make, micro_batch: int | None) -> None:
    artifact = make()
    engine, control = (opened(artifact, micro_batch=micro_batch) for _ in range(2))
    x, y = batch(4)
    x[3, 0, 0, 0] = np.nan
    assert math.isnan(engine.train_step(x, y, 0.1))
    assert all(np.array_equal(v, artifact.start[n]) for n, v in engine.state().items())
    for i in range(2):  # nor has the optimizer counted or remembered that step
        assert engine.train_step(*batch(4, i), 0.1) == control.train_step(*batch(4, i), 0.1)
    assert all(np.array_equal(v, control.state()[n]) for n, v in engine.state().items())


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_gradient_that_is_not_finite_leaves_everything_too_and_counts_as_a_loss(
    make: Make, micro_batch: int | None
) -> None:
    artifact = make(freeze_a=False)
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(4)
    state = engine.state()
    state["hidden.lora_a"][:], state["hidden.lora_b"][:] = 1e30, 0  # the square of lora_b's gradient overflows
    engine.load_state(state)
    assert math.isfinite(engine.eval_step(x, y)[0])
    assert math.isnan(engine.train_step(x, y, 1e-3))
    assert all(np.array_equal(v, state[n]) for n, v in engine.state().items())


def test_a_learning_rate_beyond_float32_shows_in_the_weights(make: Make) -> None:
    engine = opened(make(**SGD))
    engine.train_step(*batch(4), 1e39)
    assert not np.all(np.isfinite(engine.state()["fc.weight"]))


def test_what_is_frozen_in_an_adapter_is_part_of_the_state_but_cannot_be_set(make: Make) -> None:
    artifact = make(freeze_a=True)
    engine = opened(artifact)
    state = engine.state()
    assert "hidden.lora_a" not in names(artifact)
    assert np.array_equal(state["hidden.lora_a"], artifact.start["hidden.lora_a"])
    state["fc.bias"] += 1
    engine.load_state(state)
    assert np.array_equal(engine.state()["fc.bias"], state["fc.bias"])
    state["hidden.lora_a"] += 1
    with pytest.raises(ValueError, match=r"lora_a does not train in this artifact .* export the artifact again"):
        engine.load_state(state)
    del state["hidden.lora_a"], state["fc.bias"]
    with pytest.raises(ValueError, match=r"(?s)fc.bias is missing.*more is unknown.*fc.weight has shape \(2,\)"):
        engine.load_state(state | {"more": np.zeros(1), "fc.weight": np.zeros(2)})


def recalibrated(artifact: StepArtifact, parts: list[np.ndarray], start: Arrays) -> dict[str, torch.Tensor]:
    """The unfolded network with statistics averaged by torch; ``start`` holds folded trained tensors."""
    oracle = {n: torch.from_numpy(v).double() for n, v in steps.numbers(artifact.recipe.seed).items()}
    plain = oracle | {"hidden.lora_b": torch.zeros_like(oracle["hidden.lora_b"])}
    g = oracle["bn.weight"] / torch.sqrt(oracle["bn.running_var"] + EPS)
    for count, x in enumerate(parts, start=1):
        z = torch.from_numpy(x).double().mean((2, 3)) @ plain["hidden.weight"].reshape(6, 3).T + plain["hidden.bias"]
        torch.nn.functional.batch_norm(
            z, oracle["bn.running_mean"], oracle["bn.running_var"], training=True, momentum=1 / count
        )
    trained = {n: torch.from_numpy(v).double() for n, v in start.items() if n in names(artifact)}
    trained["hidden.lora_b"] = trained["hidden.lora_b"] / g[:, None]
    return oracle | trained | {"hidden.lora_a": torch.from_numpy(start["hidden.lora_a"]).double()}


def test_recalibration_folds_the_base_anew_and_keeps_the_training_so_far(make: Make) -> None:
    artifact = make(bn_policy="recalibrate")
    engine, parts = opened(artifact), [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 5)]
    engine.train_step(*batch(8), 0.05)
    oracle = recalibrated(artifact, parts, engine.state())
    before = engine.eval_step(*batch(9, 9))[1]
    engine.recalibrate(iter(parts))
    state = engine.state()
    assert all(distance(state[n], oracle[n].numpy()) < SMOOTH for n in ("bn.running_mean", "bn.running_var"))
    x, y = batch(9, 9)
    found, expected = engine.eval_step(x, y)[1], steps.logits(oracle, x, "eval").numpy()
    assert distance(found, expected) < SMOOTH
    assert distance(found, before) > 0.01


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_training_after_recalibration_differentiates_the_new_base(make: Make, micro_batch: int | None) -> None:
    artifact = make(bn_policy="recalibrate", **SGD)
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(8)
    engine.recalibrate([x * 2])
    state = engine.state()
    new = steps.folded(steps.numbers(0) | {n: v for n, v in state.items() if n.startswith("bn.")})
    oracle = steps.tensors(artifact, **new, **{n: state[n] for n in names(artifact)})
    loss = loss_of(oracle, x, y)
    loss.backward()
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: (state[n] - engine.state()[n]) / 1e4 for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


def test_recalibration_needs_its_policy_and_images(make: Make) -> None:
    with pytest.raises(ValueError, match="'frozen', not 'recalibrate'"):
        opened(make()).recalibrate([batch(4)[0]])
    with pytest.raises(DataError, match="no image"):
        opened(make(bn_policy="recalibrate")).recalibrate([])


def test_weight_and_bias_of_live_batch_normalisation_can_be_set(make: Make) -> None:
    """They do not train, but an adapter from the cloud may bring others; the graphs have them as external data."""
    artifact = make(bn_policy="batch", **SGD)
    engine, rng, (x, y) = opened(artifact), np.random.default_rng(3), batch(8)
    engine.train_step(x, y, 0.0)
    state = engine.state() | {f"bn.{f}": rng.uniform(0.5, 2, 6).astype(np.float32) for f in steps.FIELDS}
    engine.load_state(state)
    assert all(np.array_equal(v, state[n]) for n, v in engine.state().items())
    oracle = steps.tensors(artifact, **state)
    assert distance(engine.eval_step(x, y)[1], steps.logits(oracle, x, "eval").detach().numpy()) < SMOOTH
    loss = loss_of(oracle, x, y, "train")
    loss.backward()
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: (state[n] - engine.state()[n]) / 1e4 for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_the_fused_base_does_what_the_engine_does(make: Make, policy: str, tmp_path: Path) -> None:
    import onnxruntime

    artifact = make(bn_policy=policy)
    engine, (x, y) = opened(artifact), batch(8)
    for i in range(3):
        engine.train_step(*batch(8, i), 0.05)
    fuse(artifact.folder, tmp_path / "fused.onnx", engine.state())
    session = onnxruntime.InferenceSession(str(tmp_path / "fused.onnx"), providers=["CPUExecutionProvider"])
    assert distance(session.run(None, {"input": x})[0], engine.eval_step(x, y)[1]) < SMOOTH
