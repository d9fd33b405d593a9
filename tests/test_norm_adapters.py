"""Methods of biases and batch normalisation: adapter files go both ways, and what does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import batches, prepared
from norm_networks import SPEC, export, network
from shared_export import export_graph
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, select_trainable
from lorac_deploy.unfolding import as_shifts, unfold
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import run_onnx
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, ConversionError
from lorac_runtime.folding import fold_bias, fold_factor
from lorac_runtime.fused import fused_weights
from lorac_runtime.manifest import BnPolicy, TrainingDefaults
from lorac_runtime.patch import fuse as fuse_file


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
