"""Fusing: which bytes change, to which numbers, and that nothing else is touched when something is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file, save_file

from lorac_runtime import fused
from lorac_runtime import manifest as mf
from lorac_runtime.delta import adapter_rank, adapter_shapes
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError
from lorac_runtime.patch import base_weights, batchnorm_tensors, fuse, read_tensor, write_patched

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


def test_lora_b_of_zero_gives_the_very_same_file(small: Maker) -> None:
    artifact = small()
    for name in artifact.state:
        lora_b = name.endswith("lora_b")
        artifact.state[name] = (
            np.zeros_like(artifact.state[name]) if lora_b else artifact.base.get(name, artifact.state[name])
        )
    target = artifact.folder.parent / "fused.onnx"
    fuse(artifact.folder, target, artifact.state)
    assert target.read_bytes() == (artifact.folder / mf.BASE).read_bytes()
    artifact.state["conv3.lora_b"][0, 0] = 1
    fuse(artifact.folder, target, artifact.state)
    assert target.read_bytes() != (artifact.folder / mf.BASE).read_bytes()


def test_only_bytes_of_changed_tensors_change_and_the_base_stays(small: Maker) -> None:
    artifact = small()
    before = (artifact.folder / mf.BASE).read_bytes()
    target = artifact.folder.parent / "fused.onnx"
    report = fuse(artifact.folder, target, artifact.state)
    changed = {"conv1.weight", "conv2.weight", "conv3.weight", "fc.weight", "fc.bias"}
    assert set(report.tensors) == changed
    assert report.bytes_patched == sum(artifact.entry(name).nbytes for name in changed)
    assert report.seconds == report.read_seconds + report.compute_seconds + report.write_seconds > 0
    assert (artifact.folder / mf.BASE).read_bytes() == before
    old, new = (np.frombuffer(data, np.uint8) for data in (before, target.read_bytes()))
    allowed = np.zeros(len(old), bool)
    for name in changed:
        allowed[artifact.entry(name).offset :][: artifact.entry(name).nbytes] = True
    assert len(old) == len(new)
    assert not np.any((old != new) & ~allowed)


def test_tensors_of_the_base_are_read_in_their_own_shape(small: Maker) -> None:
    artifact = small()
    weights = base_weights(artifact.folder, artifact.manifest)
    assert weights.keys() == artifact.base.keys()
    for name, expected in artifact.base.items():
        np.testing.assert_array_equal(weights[name], expected)
        np.testing.assert_array_equal(read_tensor(artifact.folder, artifact.entry(name)), expected)
    assert not weights["fc.weight"].flags.writeable
    assert read_tensor(artifact.folder, artifact.entry("fc.weight")).flags.writeable


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 0, 1), (3, 0, 1, 2)])
def test_a_permuted_tensor_is_stored_permuted_and_read_back(tmp_path: Path, order: tuple[int, ...]) -> None:
    value = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    patch = mf.Patch("w", mf.BASE, 3, value.nbytes, "float32", value.shape, order)
    (tmp_path / mf.BASE).write_bytes(b"abc" + bytes(value.nbytes) + b"xyz")
    write_patched(tmp_path / mf.BASE, tmp_path / "out.onnx", [patch], {"w": value})
    assert (tmp_path / "out.onnx").read_bytes() == b"abc" + value.transpose(order).tobytes() + b"xyz"
    np.testing.assert_array_equal(read_tensor(tmp_path, dataclasses.replace(patch, file="out.onnx")), value)


def problems_of(error: type[Exception], act: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(small: Maker) -> None:
    artifact = small("batch")
    target = artifact.folder.parent / "fused.onnx"
    del artifact.state["conv2.lora_b"], artifact.state["bn1.running_mean"]
    artifact.state["fc.bias"] = np.float32([1, 2, np.nan, 4, np.inf])
    text = problems_of(AdapterError, lambda: fuse(artifact.folder, target, artifact.state))
    assert text.count("\n") == 3
    assert "conv2.lora_b is missing" in text
    assert "bn1.running_mean is missing" in text
    assert "fc.bias has 2 values of 5 that are not finite" in text
    assert not target.exists()


@pytest.mark.parametrize("name", [mf.BASE, mf.BATCHNORM])
def test_an_altered_artifact_is_refused(small: Maker, name: str) -> None:
    artifact = small("batch")
    path = artifact.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    target = artifact.folder.parent / "fused.onnx"
    assert f"{name} was altered" in problems_of(ArtifactError, lambda: fuse(artifact.folder, target, artifact.state))
    assert not target.exists()


@pytest.mark.parametrize("name", [mf.BASE, mf.BATCHNORM, mf.FILE_NAME, "../artifact/base.onnx", "link.onnx"])
def test_no_file_of_the_artifact_can_be_the_target(small: Maker, name: str) -> None:
    artifact = small()
    (artifact.folder / "link.onnx").symlink_to(artifact.folder / mf.BASE)
    before = {path: path.read_bytes() for path in artifact.folder.iterdir()}
    text = problems_of(OutputError, lambda: fuse(artifact.folder, artifact.folder / name, artifact.state))
    assert "name another output file" in text
    assert {path: path.read_bytes() for path in artifact.folder.iterdir()} == before


def test_a_target_that_cannot_be_written_leaves_everything_as_it_was(small: Maker) -> None:
    artifact = small()
    target = artifact.folder.parent / "taken"
    target.mkdir()
    before = sorted(artifact.folder.parent.rglob("*"))
    assert "cannot write" in problems_of(OutputError, lambda: fuse(artifact.folder, target, artifact.state))
    missing = artifact.folder.parent / "missing" / "fused.onnx"
    assert "Create the folder" in problems_of(OutputError, lambda: fuse(artifact.folder, missing, artifact.state))
    assert sorted(artifact.folder.parent.rglob("*")) == before


def test_overlapping_ranges_are_refused(small: Maker) -> None:
    artifact = small()
    one, two = artifact.entry("conv1.bias"), artifact.entry("fc.bias")
    patches = [one, dataclasses.replace(two, offset=one.offset + one.nbytes - 1)]
    values = {name: artifact.base[name] for name in ("conv1.bias", "fc.bias")}
    target = artifact.folder.parent / "out.onnx"
    text = problems_of(ArtifactError, lambda: write_patched(artifact.folder / mf.BASE, target, patches, values))
    assert "fc.bias overlap another tensor" in text
    assert not target.exists()


@pytest.mark.parametrize("offset", [-1, 10**6])
def test_ranges_outside_of_the_file_are_refused(small: Maker, offset: int) -> None:
    artifact = small()
    patch = dataclasses.replace(artifact.entry("fc.bias"), offset=offset)
    target = artifact.folder.parent / "out.onnx"
    for act in (
        lambda: read_tensor(artifact.folder, patch),
        lambda: write_patched(artifact.folder / mf.BASE, target, [patch], {"fc.bias": artifact.base["fc.bias"]}),
    ):
        assert "fc.bias" in problems_of(ArtifactError, act)
    assert not target.exists()


def test_patches_and_values_must_belong_together(small: Maker) -> None:
    artifact = small()
    source, target = artifact.folder / mf.BASE, artifact.folder.parent / "out.onnx"
    patch = artifact.entry("fc.bias")
    for values in ({}, {"fc.bias": artifact.base["fc.bias"], "fc.weight": artifact.base["fc.weight"]}):
        with pytest.raises(ValueError, match="patches and values differ"):
            write_patched(source, target, [patch], values)
    with pytest.raises(ValueError, match=r"fc.bias has shape \(6,\), its patch entry says \(5,\)"):
        write_patched(source, target, [patch], {"fc.bias": np.zeros(6, np.float32)})
    assert not target.exists()


def test_missing_and_empty_base_files_are_artifact_errors(tmp_path: Path) -> None:
    patch = mf.Patch("w", mf.BASE, 0, 4, "float32", (1,))
    assert "cannot be read" in problems_of(ArtifactError, lambda: read_tensor(tmp_path, patch))
    (tmp_path / mf.BASE).write_bytes(b"")
    assert "cannot be read" in problems_of(ArtifactError, lambda: read_tensor(tmp_path, patch))


@pytest.mark.parametrize("weight", ["conv1.weight", "conv2.weight", "fc.bias"])
def test_a_trained_tensor_without_patch_entry_is_an_artifact_error(small: Maker, weight: str) -> None:
    artifact = small()
    patches = tuple(p for p in artifact.manifest.patches if p.tensor != weight)
    artifact = artifact.with_manifest(patches=patches)
    target = artifact.folder.parent / "out.onnx"
    text = problems_of(ArtifactError, lambda: fuse(artifact.folder, target, artifact.state))
    assert f"no entry for {weight}" in text


@pytest.mark.parametrize(("policy", "wrong"), [("batch", "folded"), ("recalibrate", "unfolded")])
def test_a_policy_in_the_wrong_coordinates_is_an_artifact_error(small: Maker, policy: str, wrong: str) -> None:
    artifact = small(policy).with_manifest(coordinates=wrong)
    target = artifact.folder.parent / "out.onnx"
    text = problems_of(ArtifactError, lambda: fuse(artifact.folder, target, artifact.state))
    assert f"bn_policy '{policy}' needs" in text


@pytest.mark.parametrize("lost", ["bn2.conv_bias", "norm.weight", "bn2.conv_rows"])
def test_an_incomplete_batchnorm_file_is_an_artifact_error(small: Maker, lost: str) -> None:
    artifact = small("batch", zero_channels=True)
    path = artifact.folder / mf.BATCHNORM
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path)
    files = {**artifact.manifest.files, mf.BATCHNORM: mf.FileEntry(mf.sha256(path), path.stat().st_size)}
    artifact = artifact.with_manifest(files=files)
    target = artifact.folder.parent / "out.onnx"
    assert "export" in problems_of(ArtifactError, lambda: fuse(artifact.folder, target, artifact.state))


def test_an_artifact_that_never_had_batchnorm_needs_no_file_for_it(small: Maker) -> None:
    artifact = small()
    files = {mf.BASE: artifact.manifest.files[mf.BASE]}
    artifact = artifact.with_manifest(files=files, batchnorms=())
    (artifact.folder / mf.BATCHNORM).unlink()
    assert batchnorm_tensors(artifact.folder, artifact.manifest) == {}
    fuse(artifact.folder, artifact.folder.parent / "out.onnx", artifact.state)


def test_fusing_loads_no_framework(small: Maker) -> None:
    artifact = small()
    save_file(artifact.state, artifact.folder.parent / "state.safetensors")
    program = """
import sys
from pathlib import Path
from safetensors.numpy import load_file
from lorac_runtime.patch import fuse
home = Path(sys.argv[1])
fuse(home / "artifact", home / "fused.onnx", load_file(home / "state.safetensors"))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    command = [sys.executable, "-c", program, str(artifact.folder.parent)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "safetensors"} <= set(loaded)
    assert not {"torch", "onnx", "onnx_ir", "onnxruntime", "h5py", "sympy", "PIL"} & set(loaded)
    assert (artifact.folder.parent / "fused.onnx").exists()


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


def test_fusing_a_resnet18_takes_less_than_150_ms_beside_reading_and_writing(tmp_path: Path) -> None:
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
    reports = [fuse(tmp_path, tmp_path / "fused.onnx", state) for _ in range(4)]
    assert reports[0].bytes_patched > 44_000_000
    big = next(p for p in patches if p.tensor == "layer4.1.conv2.weight")  # added in many blocks
    a, b = state["layer4.1.conv2.lora_a"], state["layer4.1.conv2.lora_b"]
    change = np.einsum("oha,aiw->oihw", b.reshape(512, 3, -1), a.reshape(-1, 512, 3), optimize=True) * 2
    found = read_tensor(tmp_path, dataclasses.replace(big, file="fused.onnx"))
    np.testing.assert_allclose(found, read_tensor(tmp_path, big) + change, rtol=1e-4, atol=1e-4)
    assert min(report.compute_seconds for report in reports) < 0.15
