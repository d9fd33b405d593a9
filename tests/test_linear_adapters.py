"""Adapters on fully connected layers: plans, steps against PyTorch autograd, engines, fused files, ONNX files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from adapted_steps import (
    SGD,
    Sample,
    artifact,
    batches,
    check_steps,
    compare,
    device,
    fan,
    vgg,
)
from exporter_graphs import image, outputs
from networks import touch_adapters
from step_runs import Case, Outcome, in_pytorch
from tflite_runtimes import answers
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, detach, fuse, select_trainable
from lorac_runtime.adapter import load_adapter
from lorac_runtime.fused_files import write_fused

LORA = LoraConfig(rank=2)
CASES = {
    "lora-c": Case(SGD, lora=LORA),
    "branch": Case(SGD, lora=LORA, form="branch"),
    "weight, paper": Case(SGD, lora=LoraConfig(rank=2, layout="paper"), form="weight"),
    "learned alpha, all biases": Case(SGD, lora=LoraConfig(rank=2, learnable_alpha=True, biases="all")),
    "frozen factors": Case(SGD, lora=LoraConfig(rank=3, freeze_a=True)),
    "lora-all": Case(SGD, lora=LoraConfig(rank=4, biases="all"), method="lora-all"),
    "lora-all, weight": Case(
        SGD, lora=LoraConfig(rank=4, learnable_alpha=True, freeze_a=True), method="lora-all", form="weight"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_of_a_fully_connected_network_are_pytorchs(name: str) -> None:
    plan = check_steps(fan(), CASES[name]).plan
    layers = [a.layer for a in plan.adapters]
    assert layers == (["3"] if CASES[name].method == "lora-c" else ["1", "3", "5"])


@pytest.mark.parametrize("policy", ["frozen", "batch"])
@pytest.mark.parametrize("method", ["lora-c", "lora-all"])
def test_a_batch_normalisation_behind_a_fully_connected_layer_stays_beside_its_adapter(
    policy: str, method: str
) -> None:
    case = Case(SGD, policy=policy, lora=LORA, method=method)  # type: ignore[arg-type]
    graphs = check_steps(fan(norm=True), case)
    kinds = {node.op_type for node in graphs.base.model.graph}
    assert {"Gemm", "Mul", "Add"} <= kinds
    assert all(bn.affine for bn in graphs.base.batchnorms)


@pytest.mark.parametrize("name", CASES)
def test_steps_of_convolutions_with_fully_connected_layers_behind_them_are_pytorchs(name: str) -> None:
    case = CASES[name]
    case = (
        case
        if case.method == "lora-all"
        else dataclasses.replace(case, lora=dataclasses.replace(case.lora, linear=True))
    )
    plan = check_steps(vgg(), case).plan
    layers = [a.layer for a in plan.adapters]
    assert layers == (["4", "7", "9"] if case.method == "lora-c" else ["0", "4", "7", "9", "11"])


def test_under_batch_statistics_too() -> None:
    check_steps(vgg(), Case(SGD, policy="batch", lora=LoraConfig(rank=2, linear=True)))


def test_hidden_fully_connected_layers_stay_frozen_behind_convolutions_unless_asked_for() -> None:
    plain = check_steps(vgg(), Case(SGD, lora=LoraConfig(rank=2, biases="all"))).plan
    assert [a.layer for a in plain.adapters] == ["4"]
    assert [name for name, _ in plain.frozen] == ["7", "9"]
    assert "linear" in dict(plain.frozen)["7"]
    assert "7.bias" not in [t.name for t in plain.trainables]


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-training"])
@pytest.mark.parametrize(
    ("given", "case"),
    [
        (fan(), Case(SGD, lora=LoraConfig(rank=2, learnable_alpha=True))),
        (vgg(), Case(SGD, lora=LoraConfig(rank=2, biases="all"), method="lora-all")),
    ],
    ids=["fan", "vgg"],
)
def test_both_engines_step_as_pytorch_and_give_the_file_that_fusing_in_pytorch_gives(
    given: Sample, case: Case, engine: str, tmp_path: Path
) -> None:
    runner = device(given, case, tmp_path, engine)  # type: ignore[arg-type]
    start, fed = dict(runner.state()), batches(given)
    losses = [runner.train_step(images, labels, lr) for images, labels, lr in fed]
    state = runner.state()
    folded = fold_batchnorm(given.net)
    select_trainable(folded, case.method, case.lora)
    load_state(folded, start)
    exact = in_pytorch(folded.train(), case, fed, torch.float64)
    compare(Outcome(losses, [], {n: np.asarray(v, np.float64) for n, v in state.items()}), exact, start)
    load_state(folded, state)
    check_fused(given, folded, state, tmp_path)


def load_state(net: nn.Module, state: dict[str, np.ndarray]) -> None:
    net.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in state.items()}, strict=False)


def check_fused(given: Sample, net: nn.Module, state: dict[str, np.ndarray], folder: Path) -> None:
    """What is fused on the device computes what PyTorch's fuse does, and not what the base does."""
    write_fused(folder / "artifact", folder, state, ["onnx"])
    x = image(5, *given.shape)
    found = outputs(onnx.load(folder / "fused.onnx"), x)
    with torch.no_grad():
        wanted = fuse(net)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(outputs(onnx.load(folder / "artifact/base.onnx"), x) - wanted).max() > 1e-3


@pytest.mark.parametrize("method", ["lora-all", "lora-kernel"])
def test_the_tflite_file_gets_the_same_update(method: str, tmp_path: Path) -> None:
    artifact(vgg(), Case(SGD, lora=LORA, method=method), tmp_path)
    rng = np.random.default_rng(0)
    start = load_adapter(tmp_path / "artifact/adapter.safetensors").tensors
    state = {n: v + rng.normal(0, 0.05, v.shape).astype(np.float32) for n, v in start.items()}
    write_fused(tmp_path / "artifact", tmp_path, state, ["onnx", "tflite"])
    x = image(1, *vgg().shape)
    wanted = outputs(onnx.load(tmp_path / "fused.onnx"), x)
    (found,) = answers("ai-edge-litert", tmp_path / "fused.tflite", x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(outputs(onnx.load(tmp_path / "artifact/base.onnx"), x) - wanted).max() > 1e-3


ROUND_TRIPS = {
    "fan, BN": (fan(norm=True), "lora-c", LoraConfig(rank=2, freeze_a=True)),
    "fan, lora-all": (fan(), "lora-all", LoraConfig(rank=2, biases="all")),
    "vgg": (vgg(), "lora-c", LoraConfig(rank=2, linear=True, biases="head", layout="paper")),
    "vgg, lora-all": (vgg(), "lora-all", LoraConfig(rank=2, learnable_alpha=True, biases="head")),
    "vgg, large adapters": (vgg(), "lora-c", LoraConfig(rank=40, small_layers="adapter", linear=True)),
    "vgg, small layers in full": (vgg(), "lora-c", LoraConfig(rank=12, small_layers="full", linear=True)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_an_adapter_goes_to_the_device_and_comes_back(name: str, tmp_path: Path) -> None:
    given, method, lora = ROUND_TRIPS[name]
    net = copy.deepcopy(given.net)
    report = select_trainable(net, method, lora)
    touch_adapters(net, size=0.05)
    save_module_adapter(tmp_path / "from_torch", net, model="net")
    case = Case(SGD, lora=lora, method=method)
    manifest = artifact(given, case, tmp_path, adapter=tmp_path / "from_torch")
    assert manifest.adapters == report.adapters
    x = torch.from_numpy(image(4, *given.shape))
    for module in (copy.deepcopy(given.net), fold_batchnorm(given.net)):
        found = attach_adapter(tmp_path / "artifact/adapter.safetensors", module)
        assert (found.method, found.adapters, found.trainables) == (method, report.adapters, report.trainables)
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(x), net.eval()(x), atol=1e-5, rtol=1e-4)


def test_detach_gives_the_linear_layers_back_and_fuse_keeps_the_update() -> None:
    net = copy.deepcopy(fan().net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.from_numpy(image(4, 1, 16, 16))
    base = net(x)
    report = select_trainable(net, "lora-all", LORA)
    assert torch.equal(net(x), base)
    assert str(report).startswith(f"lora-all: {2 * (256 + 96 + 96 + 96 + 96 + 3):,} trained of")
    assert "3 adapted layers, 0 tensors in full, 0 layers frozen" in str(report)
    touch_adapters(net, size=0.05)
    adapted, fused = net(x), fuse(net)
    assert torch.equal(fused(x), adapted)
    assert (adapted - base).abs().max() > 1e-3
    detach(net)
    assert [type(part) for part in net] == [type(part) for part in fan().net] == [type(part) for part in fused]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
