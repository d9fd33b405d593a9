"""The three BN policies: the same losses, weights and statistics in PyTorch and in the engine, step by step."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_export import export_graph
from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.batchnorm import apply_policy, bn_tensors, recalibrate
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, fuse, select_trainable
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.manifest import BnPolicy, InputSpec, TrainingDefaults
from lorac_runtime.patch import fuse as fuse_file
from lorac_runtime.session import finetune

SPEC = InputSpec("input", (3, 12, 12), 1 / 255, (0.5,) * 3, (0.25,) * 3)
LR, STEPS = 0.05, 4
pytestmark = pytest.mark.parametrize("kind", ["onnxruntime", "onnxruntime-training"])


class Net(nn.Module):
    """Smooth, with a BN behind each kind of convolution and one that stands alone (pre-activation)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 12, 12) -> (N, 4)."""
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x))) + x
        x = torch.tanh(self.conv3(torch.tanh(self.bn3(x))))
        result: torch.Tensor = self.fc(x.mean((2, 3)))
        return result


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    for norm in (net.bn1, net.bn2, net.bn3):
        nn.init.uniform_(norm.weight, 0.3, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.3, 1.5)
    with torch.no_grad():
        net.bn1.weight[2] = 0.0  # a channel that cannot be unfolded from the folded weight
        net.bn2.weight[1] *= -1
    return net.eval()


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """The last one is smaller."""
    rng = np.random.default_rng(1)
    sizes = [6] * (STEPS - 1) + [3]
    return [(rng.standard_normal((n, 3, 12, 12)).astype(np.float32), rng.integers(0, 4, n)) for n in sizes]


def engine_for(
    folder: Path, net: nn.Module, *, kind: EngineChoice, policy: BnPolicy, method: str, adapter: Path | None
) -> Engine:
    config = ArtifactConfig(
        lora=LoraConfig(rank=1, rank_mode="r"),
        method=method,
        bn_policy=policy,
        engine=kind,
        training=TrainingDefaults(optimizer="sgd", clip_norm=0.0),
    )
    graph = export_graph(net, SPEC.shape)
    write_artifact(graph, folder, name="net", spec=SPEC, class_names=tuple("abcd"), config=config, adapter=adapter)
    engine = open_engine(folder, mf.load(folder))
    assert engine.name == kind
    return engine


def prepared(net: nn.Module, policy: BnPolicy, method: str) -> nn.Module:
    """The PyTorch side, trainable tensors moved away from their start."""
    net = copy.deepcopy(net)
    apply_policy(net, policy)
    select_trainable(net, method, LoraConfig(rank=1, rank_mode="r"), bn_policy=policy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.train()


def train_both(net: nn.Module, engine: Engine) -> None:
    """The same SGD steps in both; every loss must agree."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
    for images, labels in batches():
        loss = nn.functional.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert engine.train_step(images, labels, LR) == pytest.approx(loss.item(), rel=1e-5)


def check_outcome(net: nn.Module, engine: Engine, folder: Path, tmp_path: Path) -> None:
    """Weights, evaluation and the fused file after training."""
    state = engine.state()
    for name, expected in adapter_tensors(net).items():
        np.testing.assert_allclose(state[name], expected.numpy(), atol=1e-5, err_msg=name)
    images, labels = batches()[0]
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(fuse(net).eval()(torch.from_numpy(images)).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(engine.eval_step(images, labels)[1], expected, atol=2e-5)
    fuse_file(folder, tmp_path / "fused.onnx", state)
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=2e-5)
    assert np.abs(run_onnx(folder / mf.BASE, images) - expected).max() > 1e-2


@pytest.mark.parametrize("method", ["lora-c", "full"])
def test_frozen_steps_are_those_of_the_folded_network_in_pytorch(
    tmp_path: Path, kind: EngineChoice, method: str
) -> None:
    folded = prepared(fold_batchnorm(network()), "frozen", method)
    save_module_adapter(tmp_path / "start.safetensors", folded, model="net")
    engine = engine_for(
        tmp_path / "artifact",
        network(),
        kind=kind,
        policy="frozen",
        method=method,
        adapter=tmp_path / "start.safetensors",
    )
    train_both(folded, engine)
    check_outcome(folded, engine, tmp_path / "artifact", tmp_path)


def test_frozen_starts_from_an_unfolded_adapter_with_pytorchs_loss(tmp_path: Path, kind: EngineChoice) -> None:
    net = prepared(network(), "frozen", "lora-c")
    save_module_adapter(tmp_path / "start.safetensors", net, model="net")
    engine = engine_for(
        tmp_path / "artifact",
        network(),
        kind=kind,
        policy="frozen",
        method="lora-c",
        adapter=tmp_path / "start.safetensors",
    )
    images, labels = batches()[0]
    loss = nn.functional.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels)).item()
    assert engine.train_step(images, labels, 0.0) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("method", ["lora-c", "full"])
def test_batch_statistics_move_as_in_pytorch(tmp_path: Path, kind: EngineChoice, method: str) -> None:
    net = prepared(network(), "batch", method)
    save_module_adapter(tmp_path / "start.safetensors", net, model="net")
    engine = engine_for(
        tmp_path / "artifact",
        network(),
        kind=kind,
        policy="batch",
        method=method,
        adapter=tmp_path / "start.safetensors",
    )
    train_both(net, engine)
    state = engine.state()
    for name, expected in bn_tensors(net).items():
        if name in state:
            np.testing.assert_allclose(state[name], expected.numpy(), atol=1e-5, err_msg=name)
    assert {n for n in state if "running" in n} == {n for n in bn_tensors(net) if "running" in n}
    check_outcome(net, engine, tmp_path / "artifact", tmp_path)


def test_recalibrated_statistics_and_the_steps_after_them_are_pytorchs(tmp_path: Path, kind: EngineChoice) -> None:
    engine = engine_for(
        tmp_path / "artifact", network(), kind=kind, policy="recalibrate", method="lora-c", adapter=None
    )
    engine.recalibrate(images for images, _ in batches())
    net = network()
    recalibrate(net, (torch.from_numpy(images) for images, _ in batches()))
    state = engine.state()
    for name, expected in bn_tensors(net).items():
        if "running" in name:
            np.testing.assert_allclose(state[name], expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    folded = prepared(fold_batchnorm(net), "frozen", "lora-c")
    engine.load_state({name: value.numpy() for name, value in adapter_tensors(folded).items()})
    train_both(folded, engine)
    check_outcome(folded, engine, tmp_path / "artifact", tmp_path)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_an_exported_artifact_trains_and_fuses_into_a_drop_in_under_every_policy(
    tmp_path: Path, kind: EngineChoice, policy: BnPolicy
) -> None:
    engine_for(tmp_path / "artifact", network(), kind=kind, policy=policy, method="lora-c", adapter=None)
    rng = np.random.default_rng(5)
    labels = np.arange(40) % 4
    images = rng.integers(0, 120, (40, 12, 12, 3)).astype(np.uint8) + (30 * labels[:, None, None, None]).astype(
        np.uint8
    )
    np.savez(tmp_path / "local.npz", images=images, labels=labels)
    config = FinetuneConfig(epochs=8, batch_size=8, lr=0.2)
    report = finetune(tmp_path / "artifact", tmp_path / "local.npz", tmp_path / "adapted", config)
    assert report.epoch_losses[-1] < report.epoch_losses[0]
    verdict = verify(tmp_path / "artifact" / mf.BASE, tmp_path / "adapted" / "fused.onnx")
    assert verdict.ok
    assert {check.verdict for check in verdict.checks} == {"pass"}
