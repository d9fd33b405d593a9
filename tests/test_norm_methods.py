"""Methods of biases and batch normalisation: each step on a device is PyTorch's, and files go both ways."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_networks import SPEC, Net, export, network
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.batchnorm import bn_tensors, recalibrate
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, fuse, report_of, select_trainable
from lorac_deploy.unfolding import as_shifts, unfold
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.verify import run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, ConversionError
from lorac_runtime.folding import fold_bias, fold_factor
from lorac_runtime.fused import fused_weights
from lorac_runtime.manifest import BnPolicy, TrainingDefaults
from lorac_runtime.patch import fuse as fuse_file

LR, STEPS = 0.05, 3
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


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """The last one is smaller."""
    rng = np.random.default_rng(1)
    sizes = [6] * (STEPS - 1) + [4]
    return [(rng.standard_normal((n, 3, 8, 8)).astype(np.float32), rng.integers(0, 4, n)) for n in sizes]


def prepared(method: str, policy: BnPolicy | None = None, *, blocks: tuple[str, ...] = (), moved: float = 0.1) -> Net:
    """The PyTorch side, trainable tensors ``moved`` away from their start."""
    net = network()
    select_trainable(net, method, LoraConfig(blocks=blocks), bn_policy=policy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    return net


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


@pytest.mark.parametrize("method", ["bias", "bn", "tent"])
@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_an_adapter_goes_to_a_device_and_back(tmp_path: Path, method: str, policy: BnPolicy) -> None:
    net = prepared(method, policy)
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    export(tmp_path / "artifact", method, policy, adapter=tmp_path / "cloud.safetensors")
    back = network()
    report = attach_adapter(tmp_path / "artifact" / mf.ADAPTER, back)
    assert (report.method, report.bn_policy) == (method, policy)
    for name, expected in adapter_tensors(net).items():
        if method == "bias":
            np.testing.assert_allclose(adapter_tensors(back)[name], expected, atol=3e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(adapter_tensors(back)[name], expected, err_msg=name)


def test_a_bias_adapter_of_recalibrated_statistics_comes_back(tmp_path: Path) -> None:
    manifest = export(tmp_path / "artifact", "bias", "recalibrate")
    engine = open_engine(tmp_path / "artifact", manifest)
    engine.recalibrate(images for images, _ in batches())
    for images, labels in batches():
        engine.train_step(images, labels, 0.3)
    state = engine.state()
    metadata = load_adapter(tmp_path / "artifact" / mf.ADAPTER).metadata
    save_adapter(tmp_path / "device.safetensors", state, metadata)
    net = network()
    attach_adapter(tmp_path / "device.safetensors", net)
    fuse_file(tmp_path / "artifact", tmp_path / "fused.onnx", state)
    images = batches()[0][0]
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=2e-5)
    assert np.abs(run_onnx(tmp_path / "artifact" / mf.BASE, images) - expected).max() > 1e-2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_shifts_survive_folding_whatever_the_scale(channels: int, with_bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, channels, 1, bias=with_bias), nn.BatchNorm2d(channels))
    scales = torch.tensor([0.0, 1e-9, -1.0, 2.0])[torch.randint(4, (channels,))]
    net[1].weight.data = scales
    net[1].running_mean.normal_()  # type: ignore[operator, union-attr]
    shift = torch.randn(channels)
    bias = np.zeros(channels) if net[0].bias is None else net[0].bias.detach().numpy()
    factor = fold_factor(scales.numpy(), np.ones(channels), 1e-5)
    folded = fold_bias(bias, factor, shift.numpy(), net[1].running_mean.numpy())  # type: ignore[union-attr, operator]
    named = as_shifts({"1": "0"}, {"0.bias": folded}, {"1.bias"})
    moved, problems = unfold(net, {"1": "0"}, named, {})
    assert not problems
    np.testing.assert_allclose(moved["1.bias"], shift.numpy(), atol=1e-6)


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


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    for method in ("bn", "tent"):
        with pytest.raises(ValueError, match="no batch normalisation with a scale and a shift"):
            select_trainable(plain, method, LoraConfig())
    config = ArtifactConfig(method="recalibrate", training=TrainingDefaults(loss="entropy"))
    model = export_graph(plain, SPEC.shape)
    with pytest.raises(ConversionError, match="recalibrate' needs batch normalisations"):
        write_artifact(model, tmp_path / "x", name="net", spec=SPEC, class_names=tuple("abcd"), config=config)
    with pytest.raises(ValueError, match="trains nothing; leave them out"):
        select_trainable(network(), "recalibrate", LoraConfig(blocks=("conv1",)))
    with pytest.raises(ValueError, match="method bn does not go with BN policy 'recalibrate'"):
        ArtifactConfig(method="bn", bn_policy="recalibrate")
    with pytest.raises(ValueError, match="method tent does not go with loss 'cross_entropy': choose entropy"):
        ArtifactConfig(method="tent", training=TrainingDefaults())
    with pytest.raises(ValueError, match="onnxruntime-training has no loss entropy"):
        export(tmp_path / "x", "tent", kind="onnxruntime-training")
    with pytest.raises(ValueError, match="no scale or shift of a batch normalisation in blocks fc"):
        select_trainable(network(), "bn", LoraConfig(blocks=("head",)))
    with pytest.raises(ValueError, match="'layer9' holds no layer that could train"):
        select_trainable(network(), "bn", LoraConfig(blocks=("layer9",)))


def test_an_adapter_of_another_method_does_not_pass(tmp_path: Path) -> None:
    save_module_adapter(tmp_path / "bias.safetensors", prepared("bias"), model="net")
    with pytest.raises(AdapterError, match="method: the adapter has 'bias', the artifact 'bn'"):
        export(tmp_path / "artifact", "bn", adapter=tmp_path / "bias.safetensors")
    with pytest.raises(AdapterError, match="method: the file says 'bias', this network has 'bn'"):
        load_module_adapter(tmp_path / "bias.safetensors", prepared("bn"))


def test_policy_and_coordinates_that_contradict_are_refused(tmp_path: Path) -> None:
    manifest = export(tmp_path / "artifact", "bn", "batch")
    folded = dataclasses.replace(manifest, coordinates="folded")
    norms = load_adapter(tmp_path / "artifact" / mf.BATCHNORM).tensors
    with pytest.raises(ArtifactError, match="'batch' needs unfolded coordinates"):
        fused_weights(folded, {}, {}, norms)


def test_a_folded_network_takes_a_devices_biases_as_they_are(tmp_path: Path) -> None:
    net = prepared("bias")
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    export(tmp_path / "artifact", "bias", adapter=tmp_path / "cloud.safetensors")
    folded = fold_batchnorm(network())
    attach_adapter(tmp_path / "artifact" / mf.ADAPTER, folded)
    images = torch.from_numpy(batches()[0][0])
    with torch.no_grad():
        np.testing.assert_allclose(folded.eval()(images).numpy(), net.eval()(images).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="folded by fold_batchnorm and trains a batch normalisation that was left"):
        save_module_adapter(tmp_path / "x.safetensors", folded, model="net")


@pytest.mark.parametrize("method", ["bias", "bn"])
def test_a_network_whose_norms_all_stand_alone_goes_both_ways(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    net = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    config = ArtifactConfig(method=method)
    start, plain = copy.deepcopy(net.eval()), export_graph(net, SPEC.shape)
    select_trainable(net, method, LoraConfig())
    with torch.no_grad():
        norm.bias += 0.5
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    options = {"name": "net", "spec": SPEC, "class_names": tuple("abcd"), "config": config}
    write_artifact(plain, tmp_path / "a", **options, adapter=tmp_path / "cloud.safetensors")  # type: ignore[arg-type]
    state = load_adapter(tmp_path / "a" / mf.ADAPTER).tensors
    fuse_file(tmp_path / "a", tmp_path / "fused.onnx", state)
    images = batches()[0][0]
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=1e-5)
    attach_adapter(tmp_path / "a" / mf.ADAPTER, start)
    for name, value in adapter_tensors(net).items():
        np.testing.assert_allclose(adapter_tensors(start)[name], value, atol=3e-7, err_msg=name)
