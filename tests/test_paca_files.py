"""Method paca: artifacts on both engines, fused files, and adapter files there and back."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_artifacts
import torch
from foldable import FILE, images, tiny
from networks import touch_adapters

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, adapter_tensors, report_of, select_trainable
from lorac_exporters import tflite
from lorac_exporters.onnx_file import read_graph
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ArtifactError
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.patch import batchnorm_tensors
from lorac_runtime.patch import fuse as fuse_file

SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, clip_norm=0.0)
PLAIN_SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
PACA = LoraConfig(share=0.4, biases="all", seed=3)
SHARE = LoraConfig(share=0.4, seed=3)


def config(**fields: Any) -> dict[str, Any]:
    return {"method": "paca", "lora": SHARE, "training": PLAIN_SGD, **fields}


def device_steps(engine: Any, count: int = 3) -> list[float]:
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(count):
        x = rng.standard_normal((6, *small_artifacts.SPEC.shape)).astype(np.float32)
        losses.append(engine.train_step(x, rng.integers(0, 4, 6), 0.05))
    return losses


def run_file(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"input": x})[0]
    return found


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> mf.Manifest:
    folder = tmp_path_factory.mktemp("paca") / "artifact"
    return small_artifacts.export(folder, **config(tflite="none")).manifest


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_both_engines_train_alike_and_the_fused_file_answers_like_the_device(tmp_path: Path, policy: Any) -> None:
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config(engine="both", bn_policy=policy))
    manifest = mf.load(folder)
    assert [p.tensor for p in manifest.partials] == ["0.partial", "3.partial"]
    x = np.random.default_rng(5).standard_normal((4, *small_artifacts.SPEC.shape)).astype(np.float32)
    ends = []
    for name in ("onnxruntime", "onnxruntime-training"):
        engine = open_engine(folder, manifest, engine=name, threads=1)
        fuse_file(folder, tmp_path / "start.onnx", engine.state())
        if policy == "frozen":
            assert (tmp_path / "start.onnx").read_bytes() == (folder / mf.BASE).read_bytes()
        if policy == "recalibrate":
            engine.recalibrate([x])
            fuse_file(folder, tmp_path / "recalibrated.onnx", engine.state())
            net = small_artifacts.network()
            recalibrate(net, [torch.from_numpy(x)])
            expected = net.eval()(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(run_file(tmp_path / "recalibrated.onnx", x), expected, atol=2e-5)
        losses = device_steps(engine)
        fuse_file(folder, tmp_path / "fused.onnx", engine.state())
        _, logits = engine.eval_step(x, np.zeros(4, np.int64))
        np.testing.assert_allclose(run_file(tmp_path / "fused.onnx", x), logits, atol=2e-5)
        ends.append((losses, engine.state()))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5)
    for name, value in ends[0][1].items():
        np.testing.assert_allclose(value, ends[1][1][name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8"])
def test_the_patched_tflite_file_is_what_exporting_the_fused_network_gives(tmp_path: Path, weights: Any) -> None:
    folder = tmp_path / "artifact"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 10, 3), dtype=np.uint8) if weights == "int8" else None
    small_artifacts.export(folder, **config(tflite=weights), calibration=pixels)
    state = load_adapter(folder / mf.ADAPTER).tensors
    state = {
        n: (v + 0.05 * np.random.default_rng(1).uniform(size=v.shape)).astype(np.float32) for n, v in state.items()
    }
    report = fuse_file(folder, tmp_path / "fused.tflite", state, base=mf.BASE_TFLITE)
    fuse_file(folder, tmp_path / "fused.onnx", state)
    manifest = mf.load(folder)
    tflite.export(
        read_graph(tmp_path / "fused.onnx"),
        tmp_path / "fresh.tflite",
        tflite.TfliteConfig(weights),
        spec=manifest.input,
        class_names=manifest.class_names,
        name=manifest.model,
        calibration=tflite.ranges_of(folder / mf.BASE_TFLITE) if weights == "int8" else None,
    )
    assert {"0.weight", "3.weight", "7.weight"} <= set(report.tensors)
    assert (tmp_path / "fused.tflite").read_bytes() == (tmp_path / "fresh.tflite").read_bytes()


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_file_from_pytorch_gives_back_the_network_that_wrote_it(tmp_path: Path, policy: Any) -> None:
    net, other = tiny(), tiny()
    written = dataclasses.replace(PACA, blocks=("2", "5", "8"), small_layers="full")
    select_trainable(net, "paca", written, bn_policy=policy)
    touch_adapters(net)
    if policy != "frozen":
        recalibrate(net, [images()])
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    found = attach_adapter(tmp_path / FILE, other)
    assert found.partials == report_of(net).partials
    assert found.trainables == report_of(net).trainables
    assert torch.equal(other.eval()(images()), net.eval()(images()))


def test_an_unfolded_adapter_moves_to_a_device_and_back(tmp_path: Path) -> None:
    net = small_artifacts.network()
    select_trainable(net, "paca", SHARE)
    touch_adapters(net, size=0.1)
    save_module_adapter(tmp_path / FILE, net, model="net")
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config(), adapter=tmp_path / FILE)
    manifest, x = mf.load(folder), torch.randn(4, 3, 10, 10)
    start = load_adapter(folder / mf.ADAPTER)
    fuse_file(folder, tmp_path / "fused.onnx", start.tensors)
    np.testing.assert_allclose(run_file(tmp_path / "fused.onnx", x.numpy()), net(x).detach().numpy(), atol=2e-5)
    assert start.metadata["coordinates"] == "folded"
    assert not np.allclose(start.tensors["0.partial"], net[0].partial.detach().numpy(), atol=1e-3)
    again = to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), load_adapter(tmp_path / FILE))
    assert all(np.array_equal(again[name], value) for name, value in start.tensors.items())
    back = small_artifacts.network()
    attach_adapter(folder / mf.ADAPTER, back)
    for name, value in adapter_tensors(back).items():
        torch.testing.assert_close(value, net.get_parameter(name), rtol=1e-5, atol=1e-6)
    folded = fold_batchnorm(small_artifacts.network())
    attach_adapter(folder / mf.ADAPTER, folded)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=2e-5)


def test_channels_whose_scale_is_zero_cannot_be_unfolded(tmp_path: Path) -> None:
    net = tiny()
    with torch.no_grad():
        net[1].weight[2] = 0.0
    device = fold_batchnorm(net)
    select_trainable(device, "paca", SHARE)
    save_module_adapter(tmp_path / FILE, device, model="tiny")
    untrained = copy.deepcopy(net)
    (first, *_) = attach_adapter(tmp_path / FILE, untrained).partials
    torch.testing.assert_close(untrained[0].partial, net[0].weight[:, list(first.channels)])  # the network's own
    touch_adapters(device)
    save_module_adapter(tmp_path / FILE, device, model="tiny")
    with pytest.raises(AdapterError, match="rows were trained where gamma / sigma of 1 is near zero"):
        attach_adapter(tmp_path / FILE, net)


def test_an_adapter_of_other_channels_is_refused_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config())
    net = small_artifacts.network()
    select_trainable(net, "paca", dataclasses.replace(SHARE, seed=4))
    save_module_adapter(tmp_path / FILE, net, model="net")
    manifest = mf.load(folder)
    with pytest.raises(AdapterError, match="channels: the adapter has"):
        to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), load_adapter(tmp_path / FILE))
    with pytest.raises(AdapterError, match="channels: the file says"):
        load_module_adapter(folder / mf.ADAPTER, net)
    file = load_adapter(tmp_path / FILE)
    save_adapter(tmp_path / FILE, file.tensors, file.metadata | {"share": "2"})
    with pytest.raises(AdapterError, match="share must be above 0"):
        attach_adapter(tmp_path / FILE, small_artifacts.network())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"channels": (5, 1)}, "channels: must ascend within 0 to 15, got 5, 1"),
        ({"channels": (1, 1)}, "channels: must ascend"),
        ({"channels": (1, 16)}, "channels: must ascend"),
        ({"channels": (-1, 2)}, "channels: must ascend"),
        ({"channels": ()}, "channels: must ascend within 0 to 15, got none"),
        ({"channels": (1, 2)}, "3.partial has shape (16, 6, 3, 3), expected (16, 2, 3, 3)"),
        ({"tensor": "else"}, "else is not among the trainables"),
        ({"weight_shape": (16, 0, 3, 3)}, "weight_shape must be 2 to 4 positive numbers"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    manifest: mf.Manifest, change: dict[str, Any], problem: str
) -> None:
    partials = (manifest.partials[0], dataclasses.replace(manifest.partials[1], **change))
    with pytest.raises(ArtifactError) as error:
        mf.parse(dataclasses.replace(manifest, partials=partials).to_json())
    assert problem in str(error.value)


def test_the_frozen_front_hands_on_the_whole_input_of_the_first_trained_layer(tmp_path: Path) -> None:
    """Not these channels of it beside the layer's output, which would take more room."""
    lora = dataclasses.replace(SHARE, blocks=("3", "7"))
    manifest = small_artifacts.export(tmp_path / "artifact", **config(lora=lora)).manifest
    assert [f.shape for f in manifest.features] == [(16, 8, 8)]
