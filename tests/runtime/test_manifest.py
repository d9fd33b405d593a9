"""manifest.json: reading, and every contradiction it can hold."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest_checks import training_problems

Path_ = tuple[str | int, ...]
SGD = {"optimizer": "sgd"}


def edited(text: str, path: Path_, value: Any) -> str:
    """The JSON text with one value replaced."""
    tree = copy.deepcopy(json.loads(text))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_what_is_written_is_read_back(small: Callable[..., Any], policy: str) -> None:
    artifact = small(policy, learnable_alpha=True)
    assert mf.load(artifact.folder) == artifact.manifest
    mf.verify_files(artifact.folder, artifact.manifest)


def test_equal_manifests_are_equal_text(small: Callable[..., Any]) -> None:
    manifest = small().manifest
    turned = dataclasses.replace(manifest, files=dict(reversed(manifest.files.items())))
    assert turned.to_json() == manifest.to_json()


def test_trained_parameters_are_counted(small: Callable[..., Any]) -> None:
    stem, head, bias = 4 * 3 * 9, 5 * 6, 5
    conv2, conv3 = 4 * (4 * 2 + 6 * 3), 6 * (2 * 3 + 6 * 1)
    assert small().manifest.trained_parameters == stem + conv2 + conv3 + head + bias


CONTRADICTIONS: dict[str, tuple[Path_, Any, str]] = {
    "policy": (("bn_policy",), "none", "bn_policy: 'none' is not one of frozen, batch, recalibrate"),
    "coordinates": (("coordinates",), "polar", "coordinates: 'polar' is not one of folded, unfolded"),
    "role": (("trainables", 0, "role"), "soul", r"trainables.conv1.weight.role: 'soul'"),
    "layout": (("adapters", 0, "layout"), "rows", "adapters.conv2.layout: 'rows'"),
    "r": (("adapters", 0, "r"), 0, "adapters.conv2: .* must be positive"),
    "adapter shape": (("adapters", 0, "rank"), 3, r"conv2.lora_a has shape \(4, 8\), expected \(3, 8\)"),
    "idle adapter": (("trainables", 2, "name"), "x", "conv2.lora_b is not among the trainables"),
    "weight shape": (("adapters", 1, "weight_shape"), [6], "adapters.conv3: weight_shape"),
    "two adapters": (("adapters", 1, "lora_a"), "conv2.lora_a", "adapters: conv2.lora_a occurs 2 times"),
    "two trainables": (("trainables", 0, "name"), "conv2.lora_b", "trainables: conv2.lora_b occurs 2 times"),
    "two patches": (("patches", 0, "tensor"), "conv2.weight", "patches: conv2.weight in base.onnx occurs 2 times"),
    "pairs": (("adapters", 1, "pairs"), 5, "adapters.conv3.pairs: 5 pairs cannot share 6 output channels"),
    "std": (("input", "std"), [1.0, 0.0, 1.0], "scale and std positive"),
    "channels": (("input", "mean"), [0.5], "mean and std need 3 values"),
    "input shape": (("input", "shape"), [3, 0, 5], "input.shape"),
    "class names": (("class_names",), ["ant"], "class_names: 1 names for 5 classes"),
    "patch file": (("patches", 0, "file"), "other.onnx", "patches.conv1.weight: other.onnx is not in files"),
    "patch dtype": (("patches", 0, "dtype"), "float16", "432 bytes of float16 do not hold shape"),
    "patch size": (("patches", 0, "nbytes"), 428, "428 bytes of float32 do not hold shape"),
    "patch offset": (("patches", 0, "offset"), 10**9, "lie outside base.onnx"),
    "negative offset": (("patches", 0, "offset"), -4, "lie outside base.onnx"),
    "permute": (("patches", 0, "permute"), [0, 1, 2, 2], "is not an order of the 4 axes"),
    "short permute": (("patches", 6, "permute"), [0], "is not an order of the 2 axes"),
    "engine": (("engines",), {"x": {"files": ["y.onnx"], "version": "1"}}, "engines.x: y.onnx is not in files"),
    "not a number": (("input", "mean"), [0.5, 0.5, float("nan")], r"input.mean\[2\]: expected a finite number"),
    "optimizer": (("training", "optimizer"), "lion", "training.optimizer: 'lion' is not one of adamw, sgd"),
    "loss": (("training", "loss"), "hinge", "training.loss: 'hinge' is not one of cross_entropy, focal"),
    "betas": (("training", "betas"), [0.9], r"training.betas: expected 2 entries, got 1"),
    "idle option": (("training", "momentum"), 0.9, "training.momentum: is an option of sgd, the optimizer is adamw"),
    "version": (("schema_version",), 99, "schema_version 99, this runtime reads 1"),
    "version type": (("schema_version",), "1", "schema_version '1'"),
    "unknown key": (("colour",), "red", "colour: unknown key"),
    "wrong type": (("model",), 5, "model: expected text, got 5"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_named(small: Callable[..., Any], case: str) -> None:
    path, value, message = CONTRADICTIONS[case]
    text = small().manifest.to_json()
    mf.parse(text)
    with pytest.raises(ArtifactError, match=message):
        mf.parse(edited(text, path, value))


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "a\\b", "C:a", "..", ".", "", "a\0"])
def test_file_names_cannot_leave_the_folder(small: Callable[..., Any], name: str) -> None:
    manifest = small().manifest
    files = {**manifest.files, name: manifest.files[mf.BASE]}
    with pytest.raises(ArtifactError, match="names must stay inside the folder"):
        mf.parse(dataclasses.replace(manifest, files=files).to_json())


def test_a_manifest_without_base_is_refused(small: Callable[..., Any]) -> None:
    manifest = dataclasses.replace(small().manifest, files={}, patches=())
    with pytest.raises(ArtifactError, match=r"base\.onnx is missing"):
        mf.parse(manifest.to_json())


def test_several_contradictions_come_in_one_message(small: Callable[..., Any]) -> None:
    text = small().manifest.to_json()
    for case in ("policy", "role", "class names", "patch offset"):
        path, value, _ = CONTRADICTIONS[case]
        text = edited(text, path, value)
    with pytest.raises(ArtifactError) as caught:
        mf.parse(text)
    assert str(caught.value).count("\n  - ") == 4


RANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lr": ({"lr": 0.0}, ["lr: 0.0 is out of range, expected above 0"]),
    "epochs": ({"epochs": 0}, ["epochs: must be at least 1, got 0"]),
    "batch size": ({"batch_size": 0}, ["batch_size: must be at least 1, got 0"]),
    "warmup": ({"warmup": 1.1}, ["warmup: 1.1 is out of range, expected 0 to 1"]),
    "decay": ({"weight_decay": -0.1}, ["weight_decay: -0.1 is out of range, expected 0 or more"]),
    "clip": ({"clip_norm": math.inf}, ["clip_norm: inf is out of range, expected 0 or more"]),
    "momentum": ({"momentum": -0.1} | SGD, ["momentum: -0.1 is out of range, expected 0 or more"]),
    "dampening": (
        {"momentum": 0.9, "dampening": math.nan} | SGD,
        ["dampening: nan is out of range, expected a finite number"],
    ),
    "eps": ({"eps": -1e-8}, ["eps: -1e-08 is out of range, expected 0 or more"]),
    "beta1": ({"betas": (1.0, 0.9)}, ["betas[0]: 1.0 is out of range, expected at least 0 and below 1"]),
    "beta2": ({"betas": (0.9, -0.1)}, ["betas[1]: -0.1 is out of range, expected at least 0 and below 1"]),
    "smoothing": ({"label_smoothing": 1.0}, ["label_smoothing: 1.0 is out of range, expected at least 0 and below 1"]),
    "other loss": (
        {"label_smoothing": 0.1, "loss": "mse"},
        ["label_smoothing: needs the loss cross_entropy, got mse"],
    ),
    "gamma": (
        {"loss": "focal", "focal_gamma": 0.5},
        ["focal_gamma: 0.5 is out of range, expected 0, or 1 and more"],
    ),
    "distillation": (
        {"loss": "distillation", "temperature": 0.0, "distillation_weight": 1.0},
        [
            "temperature: 0.0 is out of range, expected above 0",
            "distillation_weight: 1.0 is out of range, expected above 0 and below 1",
        ],
    ),
    "idle settings of losses": (
        {"focal_gamma": 3.0, "temperature": 3.0},
        [
            "focal_gamma: needs the loss focal, got cross_entropy",
            "temperature: needs the loss distillation, got cross_entropy",
        ],
    ),
    "unknown": (
        {"optimizer": "lion", "loss": "hinge", "momentum": 0.9},
        [
            "optimizer: 'lion' is not one of adamw, sgd",
            "loss: 'hinge' is not one of cross_entropy, focal, distillation, mse, binary_cross_entropy, entropy, l1",
        ],
    ),
    "of sgd": (
        {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
        [f"{n}: is an option of sgd, the optimizer is adamw" for n in ("momentum", "dampening", "nesterov")],
    ),
    "of adamw": (
        {"betas": (0.8, 0.9), "eps": 1e-7, "amsgrad": True} | SGD,
        [f"{n}: is an option of adamw, the optimizer is sgd" for n in ("betas", "eps", "amsgrad")],
    ),
    "dampening alone": ({"dampening": 0.1} | SGD, ["dampening: needs a momentum above 0"]),
    "nesterov alone": (
        {"nesterov": True} | SGD,
        ["nesterov: needs a momentum above 0 and no dampening, got momentum 0.0 and dampening 0.0"],
    ),
    "nesterov damped": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1} | SGD,
        ["nesterov: needs a momentum above 0 and no dampening, got momentum 0.9 and dampening 0.1"],
    ),
    "several": (
        {"lr": -1.0, "eps": math.nan},
        [
            "lr: -1.0 is out of range, expected above 0",
            "eps: nan is out of range, expected 0 or more",
        ],
    ),
}


@pytest.mark.parametrize("case", RANGES)
def test_training_settings_that_are_out_of_range_or_idle_are_named(case: str) -> None:
    changes, problems = RANGES[case]
    assert training_problems(mf.TrainingDefaults(**changes)) == problems


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"betas": (0.0, 0.0), "eps": 0.0, "amsgrad": True, "label_smoothing": 0.5, "clip_norm": 0.0},
        {"momentum": 1.5, "dampening": -1.0} | SGD,
        {"momentum": 0.9, "nesterov": True, "loss": "entropy"} | SGD,
    ],
)
def test_training_settings_at_their_limits_are_accepted(changes: dict[str, Any]) -> None:
    assert training_problems(mf.TrainingDefaults(**changes)) == []


def test_training_settings_that_a_manifest_leaves_out_have_their_defaults(small: Callable[..., Any]) -> None:
    tree = json.loads(small().manifest.to_json())
    tree["training"] = {"lr": 0.5}
    assert mf.parse(json.dumps(tree)).training == mf.TrainingDefaults(lr=0.5)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_manifest_is_an_artifact_error(cut: float) -> None:
    text = '{"schema_version": 1, "model": "net", "input": {"shape": [3, 32, 32]}}'
    with pytest.raises(ArtifactError, match="export"):
        mf.parse(text[: int(cut * len(text))])


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{}", "[" * 100_000, "9" * 5000, '{"schema_version": 1}'])
def test_other_json_is_an_artifact_error(text: str) -> None:
    with pytest.raises(ArtifactError):
        mf.parse(text)


def test_a_folder_without_manifest_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a training artifact folder"):
        mf.load(tmp_path)


def test_binary_and_oversized_manifests_are_not_read(tmp_path: Path) -> None:
    (tmp_path / mf.FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="cannot be read"):
        mf.load(tmp_path)
    with (tmp_path / mf.FILE_NAME).open("wb") as stream:
        stream.truncate(mf.MAX_BYTES + 1)
    with pytest.raises(ArtifactError, match="at most 67,108,864 are expected"):
        mf.load(tmp_path)


def test_missing_cut_and_altered_files_are_all_named(small: Callable[..., Any]) -> None:
    artifact = small()
    base, norm = (artifact.folder / name for name in (mf.BASE, mf.BATCHNORM))
    content = base.read_bytes()
    base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    norm.unlink()
    with pytest.raises(ArtifactError) as caught:
        mf.verify_files(artifact.folder, artifact.manifest)
    assert "base.onnx was altered" in str(caught.value)
    assert "batchnorm.safetensors is missing" in str(caught.value)
    base.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
        mf.verify_files(artifact.folder, artifact.manifest, (mf.BASE,))
    base.write_bytes(content)
    mf.verify_files(artifact.folder, artifact.manifest, (mf.BASE,))
