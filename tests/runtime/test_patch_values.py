"""Fusing: to which numbers tensors change, against the trained network written again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from lorac_runtime import fused
from lorac_runtime import manifest as mf
from lorac_runtime.delta import adapter_rank, adapter_shapes
from lorac_runtime.patch import fuse, read_tensor

Small = Any
Maker = Callable[..., Small]
Arrays = dict[str, np.ndarray]
LIVE_BIASES = (("conv1.bias", "bias"), ("conv2.bias", "bias"))


def conv(x: np.ndarray, weight: np.ndarray, groups: int = 1) -> np.ndarray:
    """Convolution (N, C, H, W) without padding, from its definition, in float64."""
    _, c_in, k_h, k_w = weight.shape
    windows = sliding_window_view(x, (k_h, k_w), axis=(2, 3))
    per_group = len(weight) // groups
    parts = [
        np.einsum(
            "nchwuv,ocuv->nohw",
            windows[:, g * c_in : (g + 1) * c_in],
            weight[g * per_group : (g + 1) * per_group].astype(float),
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


def column(value: np.ndarray) -> np.ndarray:
    return value.astype(float).reshape(1, -1, 1, 1)


def normalise(x: np.ndarray, norms: Arrays, bn: str) -> np.ndarray:
    """Batch normalisation in evaluation mode, from its definition."""
    mean, var = column(norms[f"{bn}.running_mean"]), column(norms[f"{bn}.running_var"])
    return (x - mean) / np.sqrt(var + 1e-3) * column(norms[f"{bn}.weight"]) + column(norms[f"{bn}.bias"])


def change(artifact: Small, layer: str) -> np.ndarray:
    """The weight-space change of an adapter, from the formulas of both layouts."""
    a, b = artifact.state[f"{layer}.lora_a"], artifact.state[f"{layer}.lora_b"]
    spec = next(s for s in artifact.manifest.adapters if s.layer == layer)
    c_out, c_in, k_h, k_w = spec.weight_shape
    alpha = 5.0 if spec.lora_alpha is None else artifact.state[spec.lora_alpha][0]
    if spec.layout == "paper":
        result = (b.astype(float) @ a).reshape(spec.weight_shape)
    else:
        cubes = b.reshape(c_out, k_h, -1).astype(float), a.reshape(-1, c_in, k_w)
        result = np.einsum("oha,aiw->oihw", *cubes)
    return result * alpha / 2


def original_network(x: np.ndarray, artifact: Small) -> np.ndarray:
    """The trained network with its batch normalisations, as training under this policy had it."""
    policy, state, u = artifact.manifest.bn_policy, artifact.state, artifact.unfolded
    norms = artifact.norms | {name: state[name] for name in artifact.norms if name in state}
    live = policy == "batch"
    bias = {n: state[n] if live and n in state else u[n] for n in ("conv1.bias", "conv2.bias", "conv3.bias")}
    x = normalise(
        conv(x, state["conv1.weight"] if live else u["conv1.weight"]) + column(bias["conv1.bias"]), norms, "bn1"
    )
    weight = u["conv2.weight"]
    y = conv(x, weight + change(artifact, "conv2") if live else weight) + column(bias["conv2.bias"])
    y = normalise(y, norms, "bn2")
    if not live:  # adapters add to folded weights: behind the normalisation
        y = y + conv(x, change(artifact, "conv2"))
    y = conv(y, u["conv3.weight"] + change(artifact, "conv3"), groups=3) + column(bias["conv3.bias"])
    pooled = normalise(y, norms, "norm").mean((2, 3))
    return pooled @ state["fc.weight"].T + state["fc.bias"]


def plain_network(x: np.ndarray, values: Arrays) -> np.ndarray:
    """The network of the base file: no batch normalisation, no adapters."""
    for layer, groups in (("conv1", 1), ("conv2", 1), ("conv3", 3)):
        x = conv(x, values[f"{layer}.weight"], groups) + column(values[f"{layer}.bias"])
    x = x * values["norm.weight"] + values["norm.bias"]
    return x.mean((2, 3)) @ values["fc.weight"].T + values["fc.bias"]


def fused_values(artifact: Small) -> Arrays:
    """Fuse, and read every tensor from the fused file by hand."""
    target = artifact.folder.parent / "fused.onnx"
    fuse(artifact.folder, target, artifact.state)
    content = target.read_bytes()
    values = {}
    for p in artifact.manifest.patches:
        flat = np.frombuffer(content[p.offset : p.offset + p.nbytes], "<f4")
        values[p.tensor] = flat.reshape(p.shape[::-1]).T if p.permute else flat.reshape(p.shape)
    return values


@pytest.mark.parametrize("layout", ["spatial", "paper"])
@pytest.mark.parametrize("learnable_alpha", [False, True])
def test_frozen_fusing_adds_the_delta_and_takes_what_trained_in_full(
    small: Maker, layout: str, learnable_alpha: bool
) -> None:
    artifact = small(layout=layout, learnable_alpha=learnable_alpha, also=(*LIVE_BIASES, ("norm.weight", "bn_weight")))
    found = fused_values(artifact)
    for layer in ("conv2", "conv3"):
        expected = artifact.base[f"{layer}.weight"] + change(artifact, layer)
        np.testing.assert_allclose(found[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)
    for name in ("conv1.weight", "conv1.bias", "conv2.bias", "norm.weight", "fc.weight", "fc.bias"):
        np.testing.assert_array_equal(found[name], artifact.state[name])
    for name in ("conv3.bias", "norm.bias"):
        np.testing.assert_array_equal(found[name], artifact.base[name])


@pytest.mark.parametrize("layout", ["spatial", "paper"])
@pytest.mark.parametrize("channels", [0, 1, 4])
def test_the_size_of_the_blocks_does_not_matter(
    small: Maker, monkeypatch: pytest.MonkeyPatch, channels: int, layout: str
) -> None:
    artifact = small("batch", layout)
    whole = fused_values(artifact)
    monkeypatch.setattr(fused, "_BLOCK", channels * 96)  # multiply-adds of one output channel of conv2
    for name, value in fused_values(artifact).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["spatial", "paper"])
@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_the_fused_network_does_what_the_trained_one_did(small: Maker, policy: str, layout: str) -> None:
    artifact = small(policy, layout)
    if policy == "recalibrate":  # the stem trains in folded coordinates: take the recalibrated one
        factor = artifact.norms["bn1.weight"] / np.sqrt(artifact.state["bn1.running_var"] + 1e-3)
        artifact.state["conv1.weight"] = (factor.reshape(-1, 1, 1, 1) * artifact.unfolded["conv1.weight"]).astype("f4")
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 9))
    found = plain_network(x, fused_values(artifact))
    np.testing.assert_allclose(found, original_network(x, artifact), rtol=1e-4, atol=1e-4 * np.abs(found).max())


def test_trained_biases_and_affine_parameters_of_live_batchnorms_are_folded(small: Maker) -> None:
    norms = tuple((f"{bn}.{x}", f"bn_{x}") for bn in ("bn1", "norm") for x in ("weight", "bias"))
    artifact = small("batch", also=(*LIVE_BIASES, *norms[2:]))
    artifact.state.update({name: np.float32([1, -2, 3, 0.5]) for name in ("bn1.weight", "bn1.bias")})
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 9))
    found = plain_network(x, fused_values(artifact))
    np.testing.assert_allclose(found, original_network(x, artifact), rtol=1e-4, atol=1e-4 * np.abs(found).max())


def test_after_recalibration_what_trained_in_full_is_taken_as_it_is(small: Maker) -> None:
    artifact = small("recalibrate", also=(*LIVE_BIASES, ("norm.weight", "bn_weight"), ("norm.bias", "bn_bias")))
    found = fused_values(artifact)
    for name in ("conv1.weight", "conv1.bias", "conv2.bias", "norm.weight", "norm.bias", "fc.weight"):
        np.testing.assert_array_equal(found[name], artifact.state[name])


def test_after_recalibration_an_untrained_shift_follows_the_statistics_not_the_trained_scale(small: Maker) -> None:
    artifact = small("recalibrate", also=(("norm.weight", "bn_weight"),))
    found = fused_values(artifact)
    gamma, beta = artifact.norms["norm.weight"], artifact.norms["norm.bias"]
    mean, var = artifact.state["norm.running_mean"], artifact.state["norm.running_var"]
    np.testing.assert_allclose(found["norm.bias"].ravel(), beta - mean * gamma / np.sqrt(var + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_channels_that_folding_silenced_come_back(small: Maker, policy: str) -> None:
    artifact = small(policy, zero_channels=True)
    artifact.state["bn2.weight"] = np.linspace(0.5, 1, 6, dtype=np.float32)
    artifact.state["bn2.bias"] = artifact.norms["bn2.bias"]
    if policy == "recalibrate":
        factor = artifact.norms["bn1.weight"] / np.sqrt(artifact.state["bn1.running_var"] + 1e-3)
        artifact.state["conv1.weight"] = (factor.reshape(-1, 1, 1, 1) * artifact.unfolded["conv1.weight"]).astype("f4")
    assert not np.any(artifact.base["conv2.weight"][1])
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 9))
    found = plain_network(x, fused_values(artifact))
    np.testing.assert_allclose(found, original_network(x, artifact), rtol=1e-4, atol=1e-4 * np.abs(found).max())


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_unchanged_statistics_and_adapters_of_zero_give_the_base_back(small: Maker, policy: str) -> None:
    artifact = small(policy)
    source = artifact.unfolded if policy == "batch" else artifact.base
    for name in artifact.state:
        kept = {**source, **artifact.norms}.get(name)
        artifact.state[name] = kept if kept is not None else np.zeros_like(artifact.state[name])
    found = fused_values(artifact)
    for name, value in artifact.base.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def resnet18_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Convolutions of a ResNet-18 behind its stem."""
    shapes, c_in = {}, 64
    for stage in range(4):
        width = 64 << stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            shapes[f"{name}.conv1"], shapes[f"{name}.conv2"] = (width, c_in, 3, 3), (width, width, 3, 3)
            if c_in != width:
                shapes[f"{name}.downsample.0"] = (width, c_in, 1, 1)
            c_in = width
    return shapes


def test_fusing_a_resnet18_changes_weights_that_are_added_in_many_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    adapters, trainables, patches, state, content = [], [], [], {}, bytearray(b"odd")
    for layer, shape in resnet18_shapes().items():
        rank = adapter_rank(4, shape, "rk")
        names = [f"{layer}.{x}" for x in ("weight", "lora_a", "lora_b")]
        adapters.append(mf.Adapter(layer, *names, shape, 1, 4, rank, 8.0, "spatial"))
        for name, factor in zip(names[1:], adapter_shapes(shape, rank), strict=True):
            trainables.append(mf.Trainable(name, factor, name[-6:]))
            state[name] = rng.normal(size=factor).astype(np.float32)
        value = rng.standard_normal(shape, np.float32)
        patches.append(mf.Patch(names[0], mf.BASE, len(content), value.nbytes, "float32", shape))
        content += value.tobytes() + b"node"
    (tmp_path / mf.BASE).write_bytes(content)
    manifest = mf.Manifest(
        schema_version=1,
        model="resnet18",
        method="lora-c",
        bn_policy="frozen",
        coordinates="folded",
        input=mf.InputSpec("input", (3, 32, 32), 1.0, (0.0,) * 3, (1.0,) * 3),
        output=mf.OutputSpec("logits", 2),
        class_names=("a", "b"),
        adapters=tuple(adapters),
        trainables=tuple(trainables),
        batchnorms=(),
        training=mf.TrainingDefaults(),
        files={mf.BASE: mf.FileEntry(mf.sha256(tmp_path / mf.BASE), len(content))},
        patches=tuple(patches),
        tolerances={},
        engines={},
        model_parameters=11_000_000,
        versions={},
    )
    (tmp_path / mf.FILE_NAME).write_text(manifest.to_json())
    assert fuse(tmp_path, tmp_path / "fused.onnx", state).bytes_patched > 44_000_000
    big = next(p for p in patches if p.tensor == "layer4.1.conv2.weight")  # added in many blocks
    a, b = state["layer4.1.conv2.lora_a"], state["layer4.1.conv2.lora_b"]
    change = np.einsum("oha,aiw->oihw", b.reshape(512, 3, -1), a.reshape(-1, 512, 3), optimize=True) * 2
    found = read_tensor(tmp_path, dataclasses.replace(big, file="fused.onnx"))
    np.testing.assert_allclose(found, read_tensor(tmp_path, big) + change, rtol=1e-4, atol=1e-4)
