"""Checkpoint folders: whole or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorac_deploy.checkpoint import CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from lorac_deploy.lora import LoraConfig, attach, detach
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.errors import CheckpointError, OutputError
from lorac_runtime.manifest import InputSpec

SPEC = ModelSpec("resnet20", classes=3)
INPUT = InputSpec("input", (3, 32, 32), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
NAMES = ("cat", "dog", "owl")


def save(folder: Path, module: nn.Module | None = None, **changes: Any) -> nn.Module:
    module = build(SPEC, seed=1) if module is None else module
    settings = {"input_spec": INPUT, "class_names": NAMES, "metrics": {"accuracy": 0.5}} | changes
    save_checkpoint(folder, module, changes.pop("spec", SPEC), **{k: v for k, v in settings.items() if k != "spec"})
    return module


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    module = save(tmp_path / "a" / "b")
    found = load_checkpoint(tmp_path / "a" / "b")
    assert (found.spec, found.input, found.class_names, found.metrics) == (SPEC, INPUT, NAMES, {"accuracy": 0.5})
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.module.state_dict().items())
    assert not found.module.training
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [CONFIG, WEIGHTS]


def test_all_parts_of_the_model_spec_are_kept(tmp_path: Path) -> None:
    spec = ModelSpec("mobilenet_v3_small", classes=3, cifar_stem=True, channels=1)
    shape = dataclasses.replace(INPUT, shape=(1, 28, 28), mean=(0.5,), std=(0.5,))
    save(tmp_path, build(spec), spec=spec, input_spec=shape)
    found = load_checkpoint(tmp_path)
    assert found.spec == spec
    assert found.module(torch.zeros(1, 1, 28, 28)).shape == (1, 3)


def test_equal_checkpoints_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in (CONFIG, WEIGHTS))


def test_saving_again_replaces_the_checkpoint_and_leaves_other_files(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    module = save(tmp_path, build(SPEC, seed=2), metrics={"accuracy": 0.75})
    found = load_checkpoint(tmp_path)
    assert found.metrics == {"accuracy": 0.75}
    assert torch.equal(found.module.get_parameter("conv1.weight"), module.get_parameter("conv1.weight"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_network_with_adapters_is_refused(tmp_path: Path) -> None:
    module = build(SPEC)
    attach(module, LoraConfig(rank=1))
    with pytest.raises(ValueError, match=r"holds a plain network: save fuse\(module\)"):
        save(tmp_path / "a", module)
    assert not (tmp_path / "a").exists()
    detach(module)
    save(tmp_path / "a", module)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"class_names": ("cat",)}, "1 names for 3 classes"),
        ({"metrics": {"loss": float("nan")}}, "metric loss is nan"),
        ({"spec": ModelSpec("resnet20", classes=4)}, r"linear.weight has shape \(3, 64\), expected \(4, 64\)"),
        ({"spec": ModelSpec("resnet18", classes=3)}, "fc.weight is missing"),
        ({"input_spec": dataclasses.replace(INPUT, shape=(1, 32, 32))}, "1 channels, the model takes 3"),
        ({"input_spec": dataclasses.replace(INPUT, std=(0.2, 0.0, 0.2))}, "scale and std positive"),
        ({"input_spec": dataclasses.replace(INPUT, mean=(0.2,))}, "mean and std need 3 values"),
        ({"input_spec": dataclasses.replace(INPUT, shape=(3, 0, 32))}, "must be positive"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        save(tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save(tmp_path / "file" / "a")


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / CONFIG).rename(tmp_path / "kept")
    (tmp_path / CONFIG).mkdir()  # the new config.json cannot take its place
    with pytest.raises(OutputError):
        save(tmp_path, build(SPEC, seed=2))
    (tmp_path / CONFIG).rmdir()
    (tmp_path / "kept").rename(tmp_path / CONFIG)
    load_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} not found"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, keep: int) -> None:
    save(tmp_path)
    content = (tmp_path / name).read_bytes().rstrip()
    (tmp_path / name).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path)


def test_weights_of_another_save_are_noticed(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", build(SPEC, seed=2))
    (tmp_path / "b" / WEIGHTS).replace(tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"altered, cut short, or belongs to another save than config.json"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(format="x"), "expected lorac-checkpoint 1"),
        (lambda c: c.update(version=2), "expected lorac-checkpoint 1"),
        (lambda c: c.pop("class_names"), "class_names: missing"),
        (lambda c: c.update(extra=1), "extra: unknown key"),
        (lambda c: c["model"].update(name="resnet19"), "'resnet19' is not known"),
        (lambda c: c["model"].update(classes="3"), "model.classes: expected an integer"),
        (lambda c: c["model"].update(classes=5), "3 names for 5 classes"),
        (lambda c: c["model"].update(cifar_stem=True), "no CIFAR stem"),
        (lambda c: c["input"].update(shape=[3, 32]), r"input.shape: \(3, 32\) of uint8 images"),
        (lambda c: c["metrics"].update(loss="low"), "metrics.loss: expected a"),
        (lambda c: (c["model"].update(classes=2), c["class_names"].pop()), "linear.weight has shape"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused(tmp_path: Path, change: Any, text: str) -> None:
    save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=CONFIG):
        load_checkpoint(tmp_path)
