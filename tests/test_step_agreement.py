"""One SGD step of onnxruntime-training, through its own API, against PyTorch on the same numbers.

ResNet-18, batch 16, every trainable tensor. On a smooth copy (ReLU replaced by tanh) float32 results must agree;
on the real network, where a ReLU near zero flips now and then, float64 PyTorch is the truth and float32 PyTorch the
yardstick. Whether one batch meets a flip is luck (errors are 1e-6 without and 1e-2 with one), so six batches count.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NAMES, SPEC, touch_adapters, trained
from shared_export import export_graph
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock

from lorac_deploy.lora import adapter_tensors, attach
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import random_inputs
from lorac_runtime.manifest import TrainingDefaults

LR = 10.0  # large: an update read back as a difference of float32 weights must not drown in their rounding
Arrays = dict[str, np.ndarray]


def folded_resnet18(*, smooth: bool) -> nn.Module:
    """ResNet-18, its BN folded by PyTorch's own function."""
    net = trained("resnet18")
    net.conv1, net.bn1 = fuse_conv_bn_eval(net.conv1, net.bn1), nn.Identity()
    for block in [m for m in net.modules() if isinstance(m, BasicBlock)]:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
        if block.downsample is not None:
            block.downsample = nn.Sequential(fuse_conv_bn_eval(*block.downsample))
    for block in [net, *(m for m in net.modules() if isinstance(m, BasicBlock))]:
        block.relu = nn.Tanh() if smooth else nn.ReLU()
    return net.eval()


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return random_inputs(SPEC, 16, seed=seed), np.random.default_rng(seed).integers(0, 10, 16)


def pytorch_step(net: nn.Module, dtype: torch.dtype, seed: int) -> tuple[float, Arrays, Arrays]:
    """(loss, gradients, updates) of one step of torch.optim.SGD."""
    net = copy.deepcopy(net).to(dtype)
    images, labels = batch(seed)
    parameters = {k: p for k, p in net.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=LR)
    loss = nn.functional.cross_entropy(net(torch.from_numpy(images).to(dtype)), torch.from_numpy(labels))
    loss.backward()
    optimizer.step()
    gradients = {k: p.grad.double().numpy() for k, p in parameters.items() if p.grad is not None}
    return loss.item(), gradients, {k: (p - before[k]).detach().double().numpy() for k, p in parameters.items()}


def onnxruntime_step(folder: Path, names: list[str], seed: int) -> tuple[float, Arrays, Arrays]:
    """The same with `CheckpointState`, `Module` and `Optimizer`, without a line of ours."""
    import onnxruntime
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    onnxruntime.set_default_logger_severity(3)
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    optimizer = Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(LR)
    before = {name: state.parameters[name].data.copy() for name in names}
    images, labels = batch(seed)
    module.train()
    loss, _ = module(images, labels)
    gradients = {name: state.parameters[name].grad.astype(np.float64) for name in names}
    optimizer.step()
    updates = {name: state.parameters[name].data.astype(np.float64) - before[name] for name in names}
    return float(loss), gradients, updates


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def prepare(tmp_path: Path, *, smooth: bool) -> tuple[nn.Module, Path]:
    """The adapted PyTorch network, and an artifact that starts from the same numbers."""
    net = folded_resnet18(smooth=smooth)
    config = LoraConfig(rank=4, biases="all")
    graph = export_graph(net, SPEC.shape)
    training = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
    adapted = copy.deepcopy(net)
    attach(adapted, config)
    touch_adapters(adapted)
    adapter = tmp_path / "adapter.safetensors"
    save_as_folded(adapter, adapted)
    write_artifact(
        graph,
        tmp_path / "artifact",
        name="resnet18",
        spec=SPEC,
        class_names=NAMES,
        config=ArtifactConfig(engine="onnxruntime-training", lora=config, training=training),
        adapter=adapter,
    )
    return adapted, tmp_path / "artifact"


def save_as_folded(path: Path, net: nn.Module) -> None:
    from lorac_runtime.adapter import save_adapter

    tensors = {k: v.numpy() for k, v in adapter_tensors(net).items()}
    facts = {"model": "resnet18", "method": "lora-c", "layout": "spatial", "r": "4", "alpha": "8.0"}
    save_adapter(path, tensors, {**facts, "bn_policy": "frozen", "coordinates": "folded", "base_sha256": ""})


@pytest.mark.slow
def test_on_a_smooth_network_every_gradient_and_update_is_pytorchs(tmp_path: Path) -> None:
    net, artifact = prepare(tmp_path, smooth=True)
    loss, gradients, updates = pytorch_step(net, torch.float32, 0)
    ort_loss, ort_gradients, ort_updates = onnxruntime_step(artifact, list(gradients), 0)
    assert ort_loss == pytest.approx(loss, rel=1e-6)
    assert len(gradients) == 61  # 19 pairs of factors, stem and head weight, 20 biases and the head's
    for name in gradients:
        assert distance(ort_gradients[name], gradients[name]) <= 1e-5, name
        assert distance(ort_updates[name], updates[name]) <= 1e-5, name


@pytest.mark.slow
def test_on_the_real_network_it_is_as_near_to_float64_as_pytorch_float32_is(tmp_path: Path) -> None:
    net, artifact = prepare(tmp_path, smooth=False)
    yardstick, worst = [], []
    for seed in range(6):
        loss, exact, _ = pytorch_step(net, torch.float64, seed)
        _, single, _ = pytorch_step(net, torch.float32, seed)
        ort_loss, got, _ = onnxruntime_step(artifact, list(exact), seed)
        assert ort_loss == pytest.approx(loss, rel=1e-6)
        yardstick.append(max(distance(single[name], exact[name]) for name in exact))
        worst.append(max(distance(got[name], exact[name]) for name in exact))
    assert max(worst) <= 3 * max(yardstick)
    assert min(worst) <= 1e-5  # a batch without a flip: as on the smooth network
