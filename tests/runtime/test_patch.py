"""Fusing: which bytes change, and that nothing is touched when something is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorac_runtime import manifest as mf
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError
from lorac_runtime.patch import base_weights, batchnorm_tensors, fuse, read_tensor, write_patched

Small = Any
Maker = Callable[..., Small]


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


def test_an_entry_of_another_shape_with_as_many_bytes_is_an_artifact_error(small: Maker) -> None:
    artifact = small()
    first, *others = artifact.manifest.patches
    artifact = artifact.with_manifest(patches=(dataclasses.replace(first, shape=(*first.shape, 1)), *others))
    target = artifact.folder.parent / "out.onnx"
    text = problems_of(ArtifactError, lambda: fuse(artifact.folder, target, artifact.state))
    assert "the patch table does not fit the network" in text
    assert f"{first.tensor} has shape {first.shape}, its entry says {(*first.shape, 1)}" in text


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
