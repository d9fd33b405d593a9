"""adapter.safetensors: in, out, whether it fits, and from unfolded to folded coordinates."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lorac_runtime import manifest as mf
from lorac_runtime.adapter import AdapterFile, check_adapter, load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.delta import delta
from lorac_runtime.errors import AdapterError, ArtifactError

Small = Any
Maker = Callable[..., Small]


def metadata(manifest: mf.Manifest, **changes: str) -> dict[str, str]:
    """What an adapter made for this artifact says of itself."""
    return {
        "format": "lorac-adapter",
        "schema": "1",
        "model": manifest.model,
        "method": manifest.method,
        "layout": manifest.adapters[0].layout,
        "r": "2",
        "rank_mode": "rk",
        "alpha": "5",
        "bn_policy": manifest.bn_policy,
        "coordinates": manifest.coordinates,
        "base_sha256": manifest.files[mf.BASE].sha256,
        "producer": "tests",
        **changes,
    }


def fitting(artifact: Small, **changes: str) -> AdapterFile:
    return AdapterFile(dict(artifact.state), metadata(artifact.manifest, **changes))


def batchnorm(artifact: Small) -> dict[str, np.ndarray]:
    return load_file(artifact.folder / mf.BATCHNORM)


def test_a_saved_adapter_is_read_back(tmp_path: Path) -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "a.long.name": np.float32([1.5]),
        "index": np.array([3], np.int64),
    }
    save_adapter(tmp_path / "a.safetensors", tensors, {"model": "nét"})
    found = load_adapter(tmp_path / "a.safetensors")
    assert found.metadata == {"model": "nét", "format": "lorac-adapter", "schema": "1"}
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value)
        assert found.tensors[name].dtype == value.dtype
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["b"], tensors["b"])


def test_the_same_adapter_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    program = """
import sys, numpy as np
from pathlib import Path
from lorac_runtime.adapter import save_adapter
names = list("fabdce") if sys.argv[2] == "1" else list("abcdef")
tensors = {name: np.full(ord(name), 1, np.float32) for name in names}
save_adapter(Path(sys.argv[1]), tensors, {name * 3: name for name in names})
"""
    digests = set()
    for seed in ("1", "2", "3", "4"):
        path = tmp_path / f"{seed}.safetensors"
        command = [sys.executable, "-c", program, str(path), seed]
        changed = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, check=True, env={**os.environ, **changed})
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_tensors_stay_aligned_behind_the_sorted_header(tmp_path: Path) -> None:
    for length in range(1, 9):
        save_adapter(tmp_path / "a", {"x": np.ones(3, np.float32)}, {"m": "x" * length})
        data = (tmp_path / "a").read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert size % 8 == 0
        assert list(json.loads(data[8 : 8 + size])["__metadata__"]) == ["format", "m", "schema"]
        assert len(data) == 8 + size + 12


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_adapter_is_an_adapter_error(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    save_adapter(path, {"x": np.ones(30, np.float32)}, {})
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter(path)


def bfloat16_file() -> bytes:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\x03\x04 a zip", "not a whole"), (b"\xff" * 64, "not a whole"), (bfloat16_file(), "save it as float32")],
)
def test_other_files_are_adapter_errors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a")


def test_missing_files_and_folders_are_adapter_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not found"):
        load_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_a_fitting_adapter_is_accepted_and_stays_as_it_is(small: Maker, policy: str) -> None:
    artifact = small(policy, learnable_alpha=True)
    file = fitting(artifact)
    check_adapter(artifact.manifest, file)
    found = to_manifest_coordinates(artifact.manifest, batchnorm(artifact), file)
    assert found == file.tensors


def test_batchnorm_weight_and_bias_may_come_with_the_statistics(small: Maker) -> None:
    artifact = small("batch")
    file = fitting(artifact)
    file.tensors.update(
        {f"{bn}.{x}": artifact.norms[f"{bn}.{x}"] for bn in ("bn1", "norm") for x in ("weight", "bias")}
    )
    check_adapter(artifact.manifest, file)
    file.tensors["bn1.bias"] = np.zeros(5, np.float32)
    with pytest.raises(AdapterError, match=r"bn1\.bias has shape \(5,\), expected \(4,\)"):
        check_adapter(artifact.manifest, file)


def test_every_mismatch_of_tensors_is_listed_at_once(small: Maker) -> None:
    artifact = small()
    file = fitting(artifact)
    del file.tensors["conv2.lora_a"]
    file.tensors["layer9.lora_a"] = np.zeros(3, np.float32)
    file.tensors["fc.weight"] = np.zeros((10, 6), np.float32)
    file.tensors["conv3.lora_b"] = file.tensors["conv3.lora_b"].astype(np.float16)
    file.tensors["conv2.lora_b"][0, :3] = np.nan, np.inf, 0
    with pytest.raises(AdapterError) as caught:
        check_adapter(artifact.manifest, file)
    assert str(caught.value).splitlines() == [
        "the adapter does not fit the artifact of 'small':",
        "  - conv2.lora_a is missing",
        "  - layer9.lora_a is unexpected",
        "  - conv2.lora_b has 2 values of 72 that are not finite",
        "  - conv3.lora_b is float16, expected float32",
        "  - fc.weight has shape (10, 6), expected (5, 6)",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "peft"),
        ("schema", "2"),
        ("model", "resnet50"),
        ("method", "full"),
        ("layout", "paper"),
        ("r", "4"),
        ("r", "two"),
        ("alpha", "8.0"),
        ("bn_policy", "batch"),
        ("coordinates", "polar"),
        ("base_sha256", "0" * 64),
    ],
)
def test_a_contradiction_of_metadata_is_named(small: Maker, key: str, value: str) -> None:
    artifact = small()
    check_adapter(artifact.manifest, fitting(artifact))
    with pytest.raises(AdapterError, match=f"- {key}: .*{value}"):
        check_adapter(artifact.manifest, fitting(artifact, **{key: value}))


def test_metadata_that_is_missing_is_named_too(small: Maker) -> None:
    artifact = small()
    with pytest.raises(AdapterError) as caught:
        check_adapter(artifact.manifest, AdapterFile(artifact.state, {}))
    for key in ("format", "schema", "model", "method", "bn_policy", "layout", "r", "alpha", "coordinates"):
        assert f"- {key}: " in str(caught.value)


def test_an_adapter_without_base_hash_may_come_from_pytorch(small: Maker) -> None:
    artifact = small()
    check_adapter(artifact.manifest, fitting(artifact, base_sha256=""))


def test_a_learned_alpha_need_not_agree_with_the_default(small: Maker) -> None:
    artifact = small(learnable_alpha=True)
    check_adapter(artifact.manifest, fitting(artifact, alpha="99"))
    del artifact.state["conv3.lora_alpha"]
    with pytest.raises(AdapterError, match=r"conv3\.lora_alpha is missing"):
        check_adapter(artifact.manifest, fitting(artifact))


def test_adapters_need_their_factors_even_where_these_do_not_train(small: Maker) -> None:
    artifact = small()
    fixed = tuple(t for t in artifact.manifest.trainables if t.name != "conv2.lora_a")
    manifest = dataclasses.replace(artifact.manifest, trainables=fixed)
    check_adapter(manifest, fitting(artifact))
    del artifact.state["conv2.lora_a"]
    with pytest.raises(AdapterError, match=r"conv2\.lora_a is missing"):
        check_adapter(manifest, fitting(artifact))


def test_statistics_do_not_belong_to_a_frozen_artifact(small: Maker) -> None:
    artifact = small()
    file = fitting(artifact, coordinates="unfolded", base_sha256="")
    file.tensors["bn1.running_mean"] = file.tensors["bn2.running_mean"] = np.zeros(4, np.float32)
    message = r"2 tensors of batch normalisation \(bn1.running_mean, ...\) do not belong here.*'frozen'"
    for ask in (check_adapter, lambda m, f: to_manifest_coordinates(m, batchnorm(artifact), f)):
        with pytest.raises(AdapterError, match=message):
            ask(artifact.manifest, file)


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_statistics_are_needed_where_they_change(small: Maker, policy: str) -> None:
    artifact = small(policy)
    del artifact.state["norm.running_var"]
    artifact.state["bn1.running_var"][2] = -1
    with pytest.raises(AdapterError) as caught:
        check_adapter(artifact.manifest, fitting(artifact))
    assert "norm.running_var is missing" in str(caught.value)
    assert "bn1.running_var has negative values" in str(caught.value)


def test_an_artifact_without_patch_for_a_changing_batchnorm_is_damaged(small: Maker) -> None:
    artifact = small("batch")
    patches = tuple(p for p in artifact.manifest.patches if p.tensor != "conv2.bias")
    with pytest.raises(ArtifactError, match="changes bn2, but the patch table has no entry"):
        check_adapter(dataclasses.replace(artifact.manifest, patches=patches), fitting(artifact))


def normalise(y: np.ndarray, norms: dict[str, np.ndarray], bn: str) -> np.ndarray:
    """Batch normalisation of (positions, channels) by its textbook formula."""
    gamma, beta, mean, var = (
        norms[f"{bn}.{f}"].astype(float) for f in ("weight", "bias", "running_mean", "running_var")
    )
    return (y - mean) / np.sqrt(var + 1e-3) * gamma + beta


def unfolded_file(artifact: Small) -> AdapterFile:
    """An adapter as PyTorch saves it: counted from unfolded weights, batch normalisation by its own shapes."""
    file = fitting(artifact, coordinates="unfolded", base_sha256="")
    for name in ("norm.weight", "norm.bias"):
        if name in file.tensors:
            file.tensors[name] = file.tensors[name].reshape(-1)
    return file


@pytest.mark.parametrize("layout", ["spatial", "paper"])
@pytest.mark.parametrize("policy", ["frozen", "recalibrate"])
def test_an_unfolded_adapter_does_the_same_in_folded_coordinates(small: Maker, layout: str, policy: str) -> None:
    also = (("conv1.bias", "bias"), ("conv2.bias", "bias"))
    artifact = small(policy, layout, also=also)
    file = unfolded_file(artifact)
    state = to_manifest_coordinates(artifact.manifest, batchnorm(artifact), file)
    norms = artifact.norms | {name: v for name, v in file.tensors.items() if "running" in name}
    rng = np.random.default_rng(3)

    def change(tensors: dict[str, np.ndarray], layer: str) -> np.ndarray:
        spec = next(a for a in artifact.manifest.adapters if a.layer == layer)
        return delta(
            tensors[spec.lora_a], tensors[spec.lora_b], spec.weight_shape, spec.alpha / spec.r, spec.arrangement
        )

    # conv1 trains in full; a convolution is a product with unrolled patches.
    x = rng.normal(size=(5, 27))
    before = normalise(x @ file.tensors["conv1.weight"].reshape(4, -1).T + file.tensors["conv1.bias"], norms, "bn1")
    after = x @ state["conv1.weight"].reshape(4, -1).T + state["conv1.bias"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)

    x = rng.normal(size=(5, 24))
    weight = artifact.unfolded["conv2.weight"]
    before = normalise(
        x @ (weight + change(file.tensors, "conv2")).reshape(6, -1).T + file.tensors["conv2.bias"], norms, "bn2"
    )
    factor = norms["bn2.weight"] / np.sqrt(norms["bn2.running_var"] + 1e-3)
    folded = factor[:, None, None, None] * weight + change(state, "conv2")
    after = x @ folded.reshape(6, -1).T + state["conv2.bias"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)

    # What no batch normalisation follows, and lora_a everywhere, stay as they are.
    for name in ("conv2.lora_a", "conv3.lora_a", "conv3.lora_b", "fc.weight", "fc.bias"):
        np.testing.assert_array_equal(state[name], file.tensors[name])
    assert {name: v.shape for name, v in state.items()} == {name: v.shape for name, v in artifact.state.items()}
    assert all(v.dtype == np.float32 for v in state.values())


def test_a_trained_lone_batchnorm_becomes_scale_and_shift(small: Maker) -> None:
    artifact = small(also=(("norm.weight", "bn_weight"), ("norm.bias", "bn_bias")))
    file = unfolded_file(artifact)
    state = to_manifest_coordinates(artifact.manifest, batchnorm(artifact), file)
    x = np.random.default_rng(0).normal(size=(4, 6))
    norms = artifact.norms | {name: file.tensors[name] for name in ("norm.weight", "norm.bias")}
    assert state["norm.weight"].shape == state["norm.bias"].shape == (1, 6, 1, 1)
    found = x * state["norm.weight"].reshape(-1) + state["norm.bias"].reshape(-1)
    np.testing.assert_allclose(found, normalise(x, norms, "norm"), rtol=1e-5, atol=1e-5)


def test_a_bias_that_only_folding_made_starts_at_the_folded_one(small: Maker) -> None:
    artifact = small(also=(("conv1.bias", "bias"), ("fc.bias", "bias")))
    file = unfolded_file(artifact)
    del file.tensors["conv1.bias"]
    state = to_manifest_coordinates(artifact.manifest, batchnorm(artifact), file)
    np.testing.assert_allclose(state["conv1.bias"], artifact.base["conv1.bias"], rtol=1e-5, atol=1e-6)


def test_an_adapter_for_unfolded_weights_needs_the_batchnorm_of_the_base(small: Maker) -> None:
    artifact = small()
    bare = dataclasses.replace(artifact.manifest, batchnorms=())
    with pytest.raises(AdapterError, match="folded before it was exported"):
        to_manifest_coordinates(bare, {}, unfolded_file(artifact))
    tensors = batchnorm(artifact)
    del tensors["bn2.conv_bias"]
    with pytest.raises(AdapterError, match=r"the artifact has no bn2\.conv_bias"):
        to_manifest_coordinates(artifact.manifest, tensors, unfolded_file(artifact))


def test_a_folded_adapter_cannot_go_where_unfolded_weights_train(small: Maker) -> None:
    artifact = small("batch")
    with pytest.raises(AdapterError, match="save the adapter from PyTorch in unfolded coordinates"):
        check_adapter(artifact.manifest, fitting(artifact, coordinates="folded"))
