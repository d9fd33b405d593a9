"""Fusing into base.tflite: which bytes change, to which numbers, from formulas that are written here again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_tflite import INPUT_SCALES, dtype_of, partner_of, scales_in, stored, tflite_patch, with_tflite
from safetensors.numpy import save_file

from lorac_runtime import manifest as mf
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError
from lorac_runtime.patch import FuseReport, fuse, fused_weights, read_tensor, write_patched

Small = Any
Maker = Callable[..., Small]
Arrays = dict[str, np.ndarray]


def fused(artifact: Small) -> tuple[bytes, FuseReport]:
    """What fusing into base.tflite gives."""
    target = artifact.folder.parent / "fused.tflite"
    report = fuse(artifact.folder, target, artifact.state, base=mf.BASE_TFLITE)
    return target.read_bytes(), report


def final_values(artifact: Small) -> Arrays:
    """Every tensor of the fused network in float32, read from a fused base.onnx, whose tests are elsewhere."""
    target = artifact.folder.parent / "fused.onnx"
    fuse(artifact.folder, target, artifact.state)
    return {
        p.tensor: read_tensor(artifact.folder.parent, dataclasses.replace(p, file="fused.onnx"))
        for p in artifact.manifest.patches
        if p.file == mf.BASE
    }


def int8_layer(weight: np.ndarray, bias: np.ndarray, input_scale: float, per_tensor: bool) -> tuple[np.ndarray, ...]:
    """Weight, its scales, bias, its scales, a channel at a time."""
    rows = [weight] if per_tensor else list(weight)
    limits = [bias] if per_tensor else list(bias)
    scales = [
        max(np.abs(row).max() / 127, 2.0**-28 / input_scale, np.abs(limit).max() / (input_scale * 2.0**30))
        for row, limit in zip(rows, limits, strict=True)
    ]
    scales = np.float32(scales)
    steps = np.float32([float(scale) * input_scale for scale in scales])
    by_row = scales if len(scales) == len(weight) else np.repeat(scales, len(weight))
    by_bias = steps if len(steps) == len(bias) else np.repeat(steps, len(bias))
    numbers = [np.clip(np.rint(row / scale), -127, 127) for row, scale in zip(weight, by_row, strict=True)]
    return np.int8(numbers), scales, np.int32(np.rint(bias.astype(float) / by_bias)), steps


def untouched(artifact: Small, names: set[str], after: bytes) -> bool:
    """Whether all bytes but those of ``names`` and their scales are the base's."""
    before = (artifact.folder / mf.BASE_TFLITE).read_bytes()
    same = np.frombuffer(before, np.uint8) == np.frombuffer(after, np.uint8)
    for name in names:
        patch = tflite_patch(artifact, name)
        same[patch.offset :][: patch.nbytes] = True
        if patch.quantization is not None:
            same[patch.quantization.scales.offset :][: patch.quantization.scales.nbytes] = True
    return bool(same.all())


CHANGED = {
    "frozen": {"conv1.weight", "conv2.weight", "conv3.weight", "fc.weight", "fc.bias"},
    "batch": {f"{layer}.{part}" for layer in ("conv1", "conv2", "norm", "fc") for part in ("weight", "bias")}
    | {"conv3.weight"},
}
CHANGED["recalibrate"] = CHANGED["batch"]


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
@pytest.mark.parametrize("weights", ["float32", "fp16"])
@pytest.mark.parametrize("layout", ["spatial", "paper"])
def test_float_files_hold_the_fused_numbers_in_their_own_order(
    small: Maker, weights: str, policy: str, layout: str
) -> None:
    artifact = with_tflite(small(policy, layout), weights)
    content, report = fused(artifact)
    values = final_values(artifact)
    for name in CHANGED[policy]:
        found = stored(content, tflite_patch(artifact, name))
        expected = values[name].astype(np.float16) if dtype_of(name, weights) == "float16" else values[name]
        np.testing.assert_array_equal(found, expected)
    assert set(report.tensors) == CHANGED[policy]
    assert untouched(artifact, CHANGED[policy], content)
    assert report.bytes_patched == sum(tflite_patch(artifact, name).nbytes for name in CHANGED[policy])
    assert (report.overflowed, report.saturated) == (0, ())


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
@pytest.mark.parametrize("layout", ["spatial", "paper"])
def test_int8_files_get_new_numbers_scales_and_biases(small: Maker, policy: str, layout: str) -> None:
    artifact = with_tflite(small(policy, layout), "int8")
    content, report = fused(artifact)
    values = final_values(artifact)
    layers = ("conv1", "conv2", "conv3", "fc")
    for layer in layers:
        weight, bias = (tflite_patch(artifact, f"{layer}.{part}") for part in ("weight", "bias"))
        numbers = values[weight.tensor], values[bias.tensor]
        expected = int8_layer(*numbers, INPUT_SCALES[layer], per_tensor=layer == "fc")
        np.testing.assert_array_equal(stored(content, weight), expected[0])
        np.testing.assert_array_equal(scales_in(content, weight), expected[1])
        np.testing.assert_array_equal(stored(content, bias), expected[2])
        np.testing.assert_array_equal(scales_in(content, bias), expected[3])
    both = CHANGED[policy] | {partner_of(name) for name in CHANGED[policy] if not name.startswith("norm")}
    assert set(report.tensors) == both  # a frozen bias too: its scale follows that of its weight
    assert untouched(artifact, both, content)
    sizes = [
        p.nbytes + (p.quantization.scales.nbytes if p.quantization else 0)
        for p in (tflite_patch(artifact, name) for name in both)
    ]
    assert report.bytes_patched == sum(sizes)


def test_a_bias_that_trains_alone_is_stored_by_the_formulas_of_its_layer(small: Maker) -> None:
    artifact = with_tflite(small(also=(("conv3.bias", "bias"),)), "int8")
    manifest = artifact.manifest
    trained = tuple(t for t in manifest.trainables if t.name == "conv3.bias")
    artifact = artifact.with_manifest(adapters=(), trainables=trained)
    bias = np.float32([1e9, -0.01, 0, 3, 4, 5])  # the first is too large for the scale that its weight alone would get
    artifact = dataclasses.replace(artifact, state={"conv3.bias": bias})
    content, report = fused(artifact)
    expected = int8_layer(artifact.base["conv3.weight"], bias, INPUT_SCALES["conv3"], per_tensor=False)
    np.testing.assert_array_equal(stored(content, tflite_patch(artifact, "conv3.weight")), expected[0])
    np.testing.assert_array_equal(scales_in(content, tflite_patch(artifact, "conv3.weight")), expected[1])
    np.testing.assert_array_equal(stored(content, tflite_patch(artifact, "conv3.bias")), expected[2])
    assert expected[1][0] > 100 * np.abs(artifact.base["conv3.weight"][0]).max() / 127
    assert report.saturated == ()
    assert untouched(artifact, {"conv3.weight", "conv3.bias"}, content)


def test_numbers_beyond_half_precision_become_its_largest_and_are_counted(small: Maker) -> None:
    artifact = with_tflite(small(), "fp16")
    artifact.state["fc.weight"][0, :5] = [65519.9, 65520, -1e30, 65504, -65519]
    content, report = fused(artifact)
    found = stored(content, tflite_patch(artifact, "fc.weight"))
    np.testing.assert_array_equal(found[0, :5], np.float16([65504, 65504, -65504, 65504, -65504]))
    others = artifact.state["fc.weight"].ravel()[5:].astype(np.float16)
    np.testing.assert_array_equal(found.ravel()[5:], others)
    assert report.overflowed == 2


def test_numbers_without_an_int8_form_are_refused(small: Maker) -> None:
    artifact = with_tflite(small(), "int8")
    artifact.state["conv2.lora_a"][:] = 3e38
    artifact.state["conv2.lora_b"][:] = 3e38
    before = sorted(artifact.folder.parent.rglob("*"))
    with np.errstate(all="ignore"), pytest.raises(AdapterError, match=r"conv2.weight cannot be stored in base.tflite"):
        fused(artifact)
    assert sorted(artifact.folder.parent.rglob("*")) == before


def test_the_base_files_are_never_modified(small: Maker) -> None:
    artifact = with_tflite(small(), "int8")
    before = {path: path.read_bytes() for path in artifact.folder.iterdir()}
    fused(artifact)
    for name in (mf.BASE_TFLITE, mf.BASE):
        with pytest.raises(OutputError, match="name another output file"):
            fuse(artifact.folder, artifact.folder / name, artifact.state, base=mf.BASE_TFLITE)
    assert {path: path.read_bytes() for path in artifact.folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "longer", "another byte", "another file", "missing", "empty"])
@pytest.mark.parametrize("name", [mf.BASE_TFLITE, mf.BASE])
def test_a_base_of_another_content_is_refused(small: Maker, name: str, damage: str) -> None:
    artifact = with_tflite(small(), "float32")
    path = artifact.folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "another byte":
        content[0] ^= 1
        path.write_bytes(content)
    else:
        others = {"cut": content[:-1], "longer": content + b"x", "another file": b"PK\3\4" * 99, "empty": b""}
        path.write_bytes(others[damage])
    before = sorted(artifact.folder.parent.rglob("*"))
    with pytest.raises(ArtifactError, match=rf"{name} (has|is missing|was altered)"):
        fused(artifact)
    assert sorted(artifact.folder.parent.rglob("*")) == before


def test_a_file_that_the_artifact_does_not_have_is_refused_by_name(small: Maker) -> None:
    artifact = small()
    for base in (mf.BASE_TFLITE, mf.BATCHNORM, "model.tflite"):
        with pytest.raises(ArtifactError, match=rf"has no {base} to fuse into, it has base.onnx; export"):
            fuse(artifact.folder, artifact.folder.parent / "fused", artifact.state, base=base)


def test_a_tensor_without_entry_in_base_tflite_is_refused_by_name(small: Maker) -> None:
    artifact = with_tflite(small(), "float32")
    patches = tuple(p for p in artifact.manifest.patches if (p.file, p.tensor) != (mf.BASE_TFLITE, "conv2.weight"))
    artifact = artifact.with_manifest(patches=patches)
    with pytest.raises(ArtifactError, match=r"no entry for conv2.weight in base.tflite"):
        fused(artifact)


def test_overlapping_scales_are_refused_before_anything_is_written(small: Maker) -> None:
    artifact = with_tflite(small(), "int8")
    one, other = (tflite_patch(artifact, name) for name in ("conv2.weight", "conv2.bias"))
    quantized = dataclasses.replace(other.quantization, scales=mf.ByteRange(one.offset + 1, 24))
    patches = [one, dataclasses.replace(other, quantization=quantized)]
    target = artifact.folder.parent / "out.tflite"
    values = {name: artifact.base[name] for name in ("conv2.weight", "conv2.bias")}
    with pytest.raises(ArtifactError, match="overlap another tensor"):
        write_patched(artifact.folder / mf.BASE_TFLITE, target, patches, values)
    assert not target.exists()


def test_only_float32_numbers_can_be_read_back(small: Maker) -> None:
    artifact = with_tflite(small(), "int8")
    with pytest.raises(ValueError, match=r"conv2.weight is int8 in base.tflite; read its float32 numbers from base"):
        read_tensor(artifact.folder, tflite_patch(artifact, "conv2.weight"))
    artifact = with_tflite(small(), "float32")
    fused(artifact)
    for name in ("fc.weight", "conv1.weight"):
        patch = dataclasses.replace(tflite_patch(artifact, name), file="fused.tflite")
        np.testing.assert_array_equal(read_tensor(artifact.folder.parent, patch), artifact.state[name])


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_disk_that_fills_up_leaves_an_older_fused_file_and_no_litter(small: Maker) -> None:
    artifact = with_tflite(small(), "int8")
    home = artifact.folder.parent
    save_file(artifact.state, home / "state.safetensors")
    (home / "fused.tflite").write_bytes(b"old")
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    program = """
        import resource, sys
        from pathlib import Path
        from safetensors.numpy import load_file
        from lorac_runtime.errors import OutputError
        from lorac_runtime.patch import fuse
        home = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            fuse(home / "artifact", home / "fused.tflite", load_file(home / "state.safetensors"), base="base.tflite")
        except OutputError as err:
            print(err)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(home)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in result.stdout
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_two_adapters_of_one_weight_both_count(small: Maker) -> None:
    artifact = small()
    first = artifact.manifest.adapters[0]
    second = dataclasses.replace(first, alpha=2 * first.alpha)
    deltas = []
    for adapters in ((first,), (second,), (first, second)):
        manifest = dataclasses.replace(artifact.manifest, adapters=adapters)
        value = fused_weights(manifest, artifact.base, artifact.state, {})[first.weight]
        deltas.append(value - artifact.base[first.weight])
    np.testing.assert_allclose(deltas[2], deltas[0] + deltas[1], rtol=1e-5, atol=1e-5)
    assert np.abs(deltas[0]).max() > 0.1
