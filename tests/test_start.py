"""The network that training starts from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from training_cases import dataset, equal, spec, state_of

from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.start import from_checkpoint, from_model, with_new_head
from lorac_runtime.errors import CheckpointError

DATA = dataset()
SPEC = ModelSpec("resnet20", 3)


def checkpoint(folder: Path, seed: int = 3) -> Path:
    save_checkpoint(
        folder, build(SPEC, seed=seed), SPEC, input_spec=spec(DATA), class_names=DATA.class_names, metrics={}
    )
    return folder


def test_a_checkpoint_gives_the_network_that_it_holds(tmp_path: Path) -> None:
    start = from_checkpoint(checkpoint(tmp_path / "base"))
    assert equal(state_of(start.module), state_of(build(SPEC, seed=3)))
    assert (start.spec, start.input, start.class_names) == (SPEC, spec(DATA), DATA.class_names)
    assert start.folder == tmp_path / "base"


def test_a_new_head_has_the_new_classes_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    old = from_checkpoint(checkpoint(tmp_path / "base"))
    kept = state_of(old.module)
    start = with_new_head(old, ("a", "b"), seed=1)
    assert start.module(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert (start.spec.classes, start.class_names, start.folder) == (2, ("a", "b"), None)
    assert start.fresh == ("linear.weight", "linear.bias")
    now = state_of(start.module)
    assert all(torch.equal(now[name], kept[name]) for name in kept if name not in start.fresh)


def test_seeds_decide_first_values_of_networks_and_heads(tmp_path: Path) -> None:
    first, same, other = (
        from_model(SPEC, spec(DATA), class_names=DATA.class_names, seed=seed).module for seed in (0, 0, 1)
    )
    assert equal(state_of(first), state_of(same))
    assert not equal(state_of(first), state_of(other))
    folder = checkpoint(tmp_path / "base")
    heads = [with_new_head(from_checkpoint(folder), ("a", "b"), seed=seed).module.linear.weight for seed in (0, 1)]
    assert not torch.equal(*heads)


def test_weights_of_another_number_of_classes_leave_the_head_fresh(tmp_path: Path) -> None:
    source = build(ModelSpec("resnet20", 10), seed=5)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    start = from_model(SPEC, spec(DATA), class_names=DATA.class_names, weights=tmp_path / "w.safetensors")
    assert start.fresh == ("linear.weight", "linear.bias")
    np.testing.assert_array_equal(start.module.conv1.weight.detach(), source.conv1.weight.detach())


def test_imagenet_weights_are_known_by_name_only_where_there_are_some() -> None:
    with pytest.raises(ValueError, match="no ImageNet weights for resnet20"):
        from_model(SPEC, spec(DATA), class_names=DATA.class_names, weights=Path("imagenet"))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.pth not found"):
        from_model(SPEC, spec(DATA), class_names=DATA.class_names, weights=tmp_path / "w.pth")
