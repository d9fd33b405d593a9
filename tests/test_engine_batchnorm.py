"""Batch normalisation under the policies batch and recalibrate, against PyTorch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny_torch
import torch
from artifacts import Tiny
from engine_cases import SMOOTH, Make, batch, distance, engine_of, maker, worst
from tiny_network import BN_FIELDS, BNS, EPS

from lorac_runtime.engines import open_engine
from lorac_runtime.errors import DataError


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_running_statistics_under_batch_are_those_of_pytorch(make: Make, momentum: float) -> None:
    tiny = make(bn_policy="batch", optimizer="sgd", clip_norm=0.0, momentum=momentum, lora_b=1.0)
    oracle, engine = tiny_torch.tensors(tiny.unfolded, tiny.start), engine_of(tiny)
    for step, size in enumerate((8, 2, 1, 16)):  # small batches: n / (n - 1) is far from 1
        x, y = batch(size, step)
        tiny_torch.logits(oracle, x, bn="train", momentum=momentum)
        engine.train_step(x, y, 0.0)
    statistics = {k: v for k, v in engine.state().items() if "running" in k}
    assert len(statistics) == 2 * len(BNS)
    assert worst(statistics, {k: oracle[k].numpy() for k in statistics})[0] < 1e-6
    x, y = batch(9, 9)
    expected = tiny_torch.logits(oracle, x, bn="eval").detach().numpy()
    assert distance(engine.eval_step(x, y)[1], expected) < SMOOTH  # and evaluation uses them


def test_a_batch_without_variance_is_refused_under_batch(make: Make) -> None:
    tiny = make(bn_policy="batch")
    flat = tuple(dataclasses.replace(bn, positions=1) for bn in tiny.manifest.batchnorms)
    engine = open_engine(tiny.folder, dataclasses.replace(tiny.manifest, batchnorms=flat), threads=1)
    with pytest.raises(DataError, match="bn1 sees one value per channel in a batch of 1 image"):
        engine.train_step(*batch(1), 0.1)
    assert math.isfinite(engine.train_step(*batch(2), 0.1))


def recalibrated_oracle(tiny: Tiny, parts: list[np.ndarray]) -> tiny_torch.Tensors:
    """The unfolded base with statistics averaged over batches by torch's own BatchNorm2d(momentum=None)."""
    oracle = tiny_torch.tensors(tiny.unfolded, {})
    for count, x in enumerate(parts, start=1):
        tiny_torch.logits(oracle, x, bn="train", momentum=1.0 / count)  # what momentum=None means in torch
    return oracle


def test_recalibrated_statistics_are_pytorchs_cumulative_average(make: Make) -> None:
    tiny = make(bn_policy="recalibrate")
    parts = [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 8, 3)]
    engine = engine_of(tiny)
    engine.recalibrate(iter(parts))
    oracle = recalibrated_oracle(tiny, parts)
    found = {k: v for k, v in engine.state().items() if "running" in k}
    assert len(found) == 2 * len(BNS)
    assert worst(found, {k: oracle[k].numpy() for k in found})[0] < SMOOTH


def test_recalibration_refolds_frozen_and_trained_tensors(make: Make) -> None:
    """Seen from the unfolded network, only its statistics change: the training so far is kept."""
    tiny = make(bn_policy="recalibrate", lora_b=1.0)
    engine = engine_of(tiny)
    engine.train_step(*batch(16), 0.05)
    trained = engine.state()
    parts = [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 5)]
    oracle = recalibrated_oracle(tiny, parts)
    for name, bn in (("conv1.weight", "bn1"), ("conv2.lora_b", "bn2")):
        g = tiny.unfolded[f"{bn}.weight"] / np.sqrt(tiny.unfolded[f"{bn}.running_var"] + EPS)
        rows = np.repeat(g, trained[name].shape[0] // g.size)
        oracle[name] = torch.tensor(trained[name] / rows.reshape(-1, *[1] * (trained[name].ndim - 1))).double()
    for name in ("conv2.lora_a", "conv3.lora_a", "conv3.lora_b", "fc.weight", "fc.bias"):
        oracle[name] = torch.tensor(trained[name]).double()
    engine.recalibrate(parts)
    x, y = batch(9, 9)
    before = tiny_torch.logits(tiny_torch.tensors(tiny.folded, tiny.start), x, bn="folded").detach().numpy()
    found = engine.eval_step(x, y)[1]
    assert distance(found, tiny_torch.logits(oracle, x, bn="eval").numpy()) < SMOOTH
    assert distance(found, before) > 0.01
    assert np.array_equal(engine.state()["fc.weight"], trained["fc.weight"])


def test_training_after_recalibration_differentiates_the_refolded_network(make: Make) -> None:
    recipe = {"bn_policy": "recalibrate", "optimizer": "sgd", "clip_norm": 0.0, "activation": "Tanh"}
    tiny = make(**recipe, lora_b=1.0)
    engine, (x, y) = engine_of(tiny), batch(8)
    engine.recalibrate([x * 2])
    start = {k: v for k, v in engine.state().items() if k in tiny.start}
    statistics = {k: v for k, v in engine.state().items() if "running" in k}
    unfolded = tiny.unfolded | statistics
    from tiny_network import fold

    oracle = tiny_torch.tensors(fold(unfolded), start)
    loss, expected = tiny_torch.gradients(oracle, x, y, bn="folded", activation="Tanh")
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss, rel=1e-5)
    after = engine.state()
    assert worst({k: (start[k] - after[k]) / 1e4 for k in start}, expected)[0] < SMOOTH


def test_recalibration_needs_images_with_variance_and_its_policy(make: Make) -> None:
    with pytest.raises(ValueError, match="'frozen', not 'recalibrate'"):
        engine_of(make()).recalibrate([batch(4)[0]])
    with pytest.raises(DataError, match="no image"):
        engine_of(make(bn_policy="recalibrate")).recalibrate([])


def test_a_state_with_other_batchnorm_tensors_refolds_the_base(make: Make) -> None:
    """Gamma, beta and statistics from elsewhere; the oracle is the unfolded network with them."""
    tiny, rng = make(bn_policy="recalibrate", lora_b=1.0), np.random.default_rng(3)
    changed = {
        f"{bn}.{field}": rng.uniform(0.5, 2, channels).astype(np.float32)
        for bn, (_, channels, _) in BNS.items()
        for field in BN_FIELDS
    }
    oracle = tiny_torch.tensors(tiny.unfolded | tiny.start | changed, {})
    state = tiny.start | changed  # trained tensors as they are folded with the new ones
    for name, bn in (("conv1.weight", "bn1"), ("conv2.lora_b", "bn2")):
        unfolded = tiny.unfolded.get(name, tiny.start[name])
        oracle[name] = torch.tensor(unfolded).double()
        g = changed[f"{bn}.weight"] / np.sqrt(changed[f"{bn}.running_var"] + EPS)
        rows = np.repeat(g, len(unfolded) // g.size)
        state[name] = unfolded * rows.reshape(-1, *[1] * (unfolded.ndim - 1))
    engine = engine_of(tiny)
    engine.load_state(state)
    x, y = batch(6)
    assert distance(engine.eval_step(x, y)[1], tiny_torch.logits(oracle, x, bn="eval").numpy()) < SMOOTH
    assert all(np.array_equal(v, state[k].astype(np.float32)) for k, v in engine.state().items())
