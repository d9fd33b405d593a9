"""Methods of biases and batch normalisation: what trains, and each step on a device is PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from norm_cases import batches, prepared
from norm_networks import SPEC, Net, export, network
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.batchnorm import bn_tensors, recalibrate
from lorac_deploy.lora import adapter_tensors, fuse, report_of, select_trainable
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.manifest import BnPolicy
from lorac_runtime.patch import fuse as fuse_file

LR = 0.05
STEP, TRAINING = "onnxruntime", "onnxruntime-training"
CASES = [
    ("bias", "frozen", STEP),
    ("bias", "frozen", TRAINING),
    ("bias", "batch", STEP),
    ("bn", "frozen", STEP),
    ("bn", "frozen", TRAINING),
    ("bn", "batch", STEP),
    ("bn", "batch", TRAINING),
    ("tent", "batch", STEP),
    ("tent", "frozen", STEP),
]


def loss_of(method: str, net: nn.Module, images: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    logits = net(torch.from_numpy(images))
    if METHODS[method].loss == "entropy":
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return nn.functional.cross_entropy(logits, torch.from_numpy(labels))


def started(tmp_path: Path, method: str, policy: BnPolicy, kind: EngineChoice) -> tuple[Net, Engine]:
    """Both sides from one start, which goes to the device as an adapter file."""
    net = prepared(method, policy)
    save_module_adapter(tmp_path / "start.safetensors", net, model="net")
    manifest = export(tmp_path / "artifact", method, policy, kind=kind, adapter=tmp_path / "start.safetensors")
    engine = open_engine(tmp_path / "artifact", manifest)
    assert engine.name == kind
    return net, engine


def unfolded_bias(name: str) -> str:
    """The tensor that PyTorch trains for a folded bias of the device."""
    return {"conv1.bias": "bn1.bias", "conv2.bias": "bn2.bias"}.get(name, name)


@pytest.mark.parametrize(("method", "policy", "kind"), CASES)
def test_every_gradient_is_pytorchs(tmp_path: Path, method: str, policy: BnPolicy, kind: EngineChoice) -> None:
    net, engine = started(tmp_path, method, policy, kind)
    images, labels = batches()[0]
    loss_of(method, net.train(), images, labels).backward()
    before = engine.state()
    engine.train_step(images, labels, 1.0)  # plain SGD at rate 1: the change is the gradient
    after, seen = engine.state(), set()
    for trainable in mf.load(tmp_path / "artifact").trainables:
        name = unfolded_bias(trainable.name)
        gradient = net.get_parameter(name).grad
        assert gradient is not None
        found = (before[trainable.name] - after[trainable.name]).reshape(gradient.shape)
        np.testing.assert_allclose(found, gradient.numpy(), atol=1e-5, err_msg=name)
        seen.add(name)
    assert seen == {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "policy", "kind"), CASES)
def test_three_steps_and_the_fused_file_are_pytorchs(
    tmp_path: Path, method: str, policy: BnPolicy, kind: EngineChoice
) -> None:
    net, engine = started(tmp_path, method, policy, kind)
    optimizer = torch.optim.SGD([p for p in net.train().parameters() if p.requires_grad], lr=LR)
    for images, labels in batches():
        loss = loss_of(method, net, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert engine.train_step(images, labels, LR) == pytest.approx(loss.item(), rel=1e-5)
    state, trained = engine.state(), adapter_tensors(net)
    if policy == "batch":
        trained |= {n: v for n, v in bn_tensors(net).items() if "running" in n}
    for name in state.keys() & trained.keys() - {"bn3.bias", "bn4.bias"}:
        np.testing.assert_allclose(state[name], trained[name].numpy(), atol=1e-5, err_msg=name)
    images = batches()[0][0]
    with torch.no_grad():
        expected = fuse(net)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(engine.eval_step(images, batches()[0][1])[1], expected, atol=2e-5)
    fuse_file(tmp_path / "artifact", tmp_path / "fused.onnx", state)
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=2e-5)
    assert np.abs(run_onnx(tmp_path / "artifact" / mf.BASE, images) - expected).max() > 1e-2
    assert verify(tmp_path / "artifact" / mf.BASE, tmp_path / "fused.onnx").ok


def test_bias_trains_every_bias_once_in_pytorch_and_on_a_device(tmp_path: Path) -> None:
    trained = {t.name: t.shape for t in export(tmp_path / "artifact", "bias").trainables}
    assert trained == {
        "conv1.bias": (6,),
        "conv2.bias": (6,),
        "conv3.bias": (8,),  # that of conv4 is no bias of this network
        "fc1.bias": (7,),
        "bn3.bias": (1, 6, 1, 1),
        "bn4.bias": (1, 7),
        "fc.bias": (4,),
    }
    names = set(report_of(prepared("bias")).full)
    assert names == {"bn1.bias", "bn2.bias", "conv3.bias", "fc1.bias", "bn3.bias", "bn4.bias", "fc.bias"}


@pytest.mark.parametrize("method", ["bn", "tent"])
def test_norms_train_scale_and_shift_and_nothing_else(tmp_path: Path, method: str) -> None:
    manifest = export(tmp_path / "artifact", method)
    names = [f"bn{k}.{leaf}" for k in (1, 2, 3, 4) for leaf in ("weight", "bias")]
    assert [t.name for t in manifest.trainables] == names
    assert set(report_of(prepared(method)).full) == set(names)
    assert (manifest.coordinates, manifest.bn_policy) == ("unfolded", METHODS[method].bn_policies[0])
    changed = {p.tensor for p in manifest.patches if p.file == mf.BASE}
    assert changed == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", *names[4:]}


@pytest.mark.parametrize(
    ("method", "blocks", "expected"),
    [
        ("bn", ("conv1", "bn4"), {"bn1.weight", "bn1.bias", "bn4.weight", "bn4.bias"}),
        ("bn", ("bn2",), {"bn2.weight", "bn2.bias"}),
        ("bias", ("bn1", "fc"), {"bn1.bias", "fc.bias"}),
        ("bias", ("conv2", "conv3"), {"bn2.bias", "conv3.bias"}),
    ],
)
def test_blocks_name_a_batch_normalisation_or_its_convolution(
    tmp_path: Path, method: str, blocks: tuple[str, ...], expected: set[str]
) -> None:
    net = prepared(method, blocks=blocks)
    assert set(report_of(net).full) == expected
    if method == "bn":  # the folded network of bias has no layers bn1 and bn2
        manifest = export(tmp_path / "artifact", method, blocks=blocks)
        assert {t.name for t in manifest.trainables} == expected
        save_module_adapter(tmp_path / "part.safetensors", net, model="net")
        state = load_adapter(tmp_path / "part.safetensors").tensors
        fuse_file(tmp_path / "artifact", tmp_path / "fused.onnx", state)
        images = batches()[0][0]
        with torch.no_grad():
            expected_logits = net.eval()(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected_logits, atol=2e-5)


@pytest.mark.parametrize("method", ["bias", "bn"])
def test_words_for_blocks_mean_the_same_in_pytorch_and_on_a_device(tmp_path: Path, method: str) -> None:
    found = {}
    for word in ("front", "rear"):
        net = network()
        report = select_trainable(net, method, LoraConfig(blocks=(word,)), input_shape=SPEC.shape)
        names = {t.name for t in export(tmp_path / word, method, blocks=(word,)).trainables}
        assert {unfolded_bias(n) for n in names} == set(report.full)
        found[word] = set(report.full)
    assert {n.partition(".")[0] for n in found["front"]} == {"bn1", "bn2", "bn3"}
    assert {"bn4.bias"} <= found["rear"] == set(report_of(prepared(method)).full) - found["front"]


def test_recalibrated_statistics_and_the_fused_file_are_pytorchs(tmp_path: Path) -> None:
    manifest = export(tmp_path / "artifact", "recalibrate")
    assert manifest.trainables == ()
    assert not {n for n in manifest.files if n.startswith(("train_step", "optimizer_step", "gradient_step"))}
    engine = open_engine(tmp_path / "artifact", manifest)
    images = batches()[0][0]
    entropy, logits = engine.eval_step(images, None)
    probabilities = torch.from_numpy(logits).softmax(1)
    assert entropy == pytest.approx(-(probabilities * probabilities.log()).sum(1).mean().item(), rel=1e-5)
    np.testing.assert_allclose(logits, run_onnx(tmp_path / "artifact" / mf.BASE, images), atol=1e-6)
    engine.recalibrate(images for images, _ in batches())
    net = network()
    recalibrate(net, (torch.from_numpy(images) for images, _ in batches()))
    state = engine.state()
    for name, expected in bn_tensors(net).items():
        np.testing.assert_allclose(state[name], expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(engine.eval_step(images, None)[1], expected, atol=2e-5)
    fuse_file(tmp_path / "artifact", tmp_path / "fused.onnx", state)
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=2e-5)
    save_adapter(tmp_path / "device.safetensors", state, load_adapter(tmp_path / "artifact" / mf.ADAPTER).metadata)
    back = network()
    attach_adapter(tmp_path / "device.safetensors", back)
    with torch.no_grad():
        np.testing.assert_allclose(back.eval()(torch.from_numpy(images)).numpy(), expected, atol=1e-5)
