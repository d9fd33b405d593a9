"""Networks of signals trained by the device's engine: every number against PyTorch, under every BN policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import run_onnx
from networks import touch_adapters
from signal_networks import SHAPES, artifact, network
from torch import nn

from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, select_trainable
from lorac_exporters.plan import LoraConfig
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.manifest import BnPolicy, load
from lorac_runtime.patch import fuse

Batches = Sequence[tuple[np.ndarray, np.ndarray]]
Arrays = dict[str, np.ndarray]
LR, LORA = 0.1, LoraConfig(rank=2)


def batches(name: str, steps: int = 3) -> Batches:
    rng = np.random.default_rng(1)
    shape = (8, *SHAPES[name])
    return [(rng.standard_normal(shape, dtype=np.float32), rng.integers(0, 3, 8)) for _ in range(steps)]


def trained_net(net: nn.Module, method: str, policy: BnPolicy, given: Batches) -> nn.Module:
    """The PyTorch side before its first step, in float64 and the artifact's coordinates."""
    net = copy.deepcopy(net)
    if policy == "recalibrate":
        recalibrate(net, [torch.from_numpy(images) for images, _ in given])
    net = net if policy == "batch" else fold_batchnorm(net)
    select_trainable(net, method, LORA, bn_policy="frozen" if policy == "recalibrate" else policy)
    return net.double().train()


def steps_in_pytorch(net: nn.Module, given: Batches) -> tuple[list[float], Arrays]:
    """Losses of SGD steps, and the gradients of the first one; ``net`` is changed."""
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer, losses, first = torch.optim.SGD(parameters.values(), lr=LR), [], {}
    for images, labels in given:
        loss = nn.functional.cross_entropy(net(torch.from_numpy(images).double()), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        first = first or {name: p.grad.numpy().copy() for name, p in parameters.items() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def steps_on_device(engine: Engine, given: Batches) -> tuple[list[float], Arrays]:
    """The same through the engine; a gradient is what the first step changed, divided by the learning rate."""
    before, losses, first = engine.state(), [], {}
    for images, labels in given:
        losses.append(engine.train_step(engine.inputs(images), labels, LR))
        first = first or {name: (before[name].astype(float) - value) / LR for name, value in engine.state().items()}
    return losses, first


def assert_near(found: np.ndarray, exact: np.ndarray, what: str) -> None:
    assert found.shape == exact.shape, what
    assert np.linalg.norm(found - exact) <= 1e-4 * max(1e-2, float(np.linalg.norm(exact))), what


def state_of(net: nn.Module) -> Arrays:
    return {name: value.numpy() for name, value in net.state_dict().items()}


CASES: list[tuple[str, str, BnPolicy]] = [
    ("mlp", "full", "frozen"),
    ("mlp", "head", "frozen"),
    ("mlp", "lora-c", "frozen"),
    ("cnn1d", "full", "frozen"),
    ("cnn1d", "head", "frozen"),
    ("cnn1d", "lora-c", "frozen"),
    ("cnn1d", "full", "batch"),
    ("cnn1d", "full", "recalibrate"),
    ("normed", "full", "frozen"),
    ("normed", "full", "batch"),
    ("normed", "full", "recalibrate"),
]


@pytest.mark.parametrize(("name", "method", "policy"), CASES)
def test_losses_gradients_weights_and_the_fused_file_are_pytorchs(
    tmp_path: Path, name: str, method: str, policy: BnPolicy
) -> None:
    plain, given = network(name, smooth=True), batches(name)
    report = artifact(
        tmp_path / "a", name, smooth=True, method=method, bn_policy=policy, engine="onnxruntime", lora=LORA
    )
    engine = open_engine(tmp_path / "a", report.manifest, threads=1)
    if policy == "recalibrate":
        engine.recalibrate([images for images, _ in given])
    net = trained_net(plain, method, policy, given)
    if method == "lora-c":
        touch_adapters(net)
        engine.load_state({name: value.numpy().astype(np.float32) for name, value in adapter_tensors(net).items()})
    exact_losses, exact_gradients = steps_in_pytorch(net, given)
    losses, gradients = steps_on_device(engine, given)
    assert losses == pytest.approx(exact_losses, rel=2e-6)
    assert {t.name for t in report.manifest.trainables} == exact_gradients.keys()
    state, exact_state = engine.state(), state_of(net)
    for trained in exact_gradients:
        assert_near(gradients[trained], exact_gradients[trained], f"gradient of {trained}")
        assert_near(state[trained], exact_state[trained], trained)
    fuse(tmp_path / "a", tmp_path / "fused.onnx", state)
    images = batches(name, 4)[3][0]
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(images).double()).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_behind_a_fully_connected_layer_move_as_pytorchs(tmp_path: Path) -> None:
    plain, given = network("normed", smooth=True), batches("normed")
    report = artifact(tmp_path / "a", "normed", smooth=True, method="full", bn_policy="batch", engine="onnxruntime")
    engine = open_engine(tmp_path / "a", report.manifest, threads=1)
    net = trained_net(plain, "full", "batch", given)
    steps_in_pytorch(net, given)
    steps_on_device(engine, given)
    state, exact = engine.state(), state_of(net)
    moved = [name for name in exact if "running_" in name]
    assert len(moved) == 4
    for name in moved:
        assert_near(state[name], exact[name], name)


def test_batch_normalisation_behind_a_fully_connected_layer_is_a_mul_and_an_add(tmp_path: Path) -> None:
    manifest: Any = artifact(tmp_path / "a", "normed", method="full").manifest
    assert [(bn.affine, bn.positions) for bn in manifest.batchnorms] == [(True, 1), (True, 1)]
    assert load(tmp_path / "a") == manifest
