"""Adapter files between PyTorch and a device: settings, tensors, statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldable import FILE, SMALL, DataDependent, images, rewrite, tiny
from networks import touch_adapters
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, coordinates, load_module_adapter, save_module_adapter
from lorac_deploy.batchnorm import bn_tensors, recalibrate
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, adapter_tensors, attach, select_trainable
from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import AdapterError


@pytest.mark.parametrize("method", ["lora-c", "head", "full"])
@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_file_gives_back_the_network_that_wrote_it(tmp_path: Path, method: str, policy: Any) -> None:
    net, other = tiny(), tiny()
    for module in (net, other):
        select_trainable(module, method, LoraConfig(rank=1, learnable_alpha=True), bn_policy=policy)
    touch_adapters(net)
    if policy != "frozen":
        recalibrate(net, [images()])
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    load_module_adapter(tmp_path / FILE, other)
    assert torch.equal(other.eval()(images()), net.eval()(images()))
    written = set(load_adapter(tmp_path / FILE).tensors)
    assert written == set(adapter_tensors(net)) | (set(bn_tensors(net)) if policy != "frozen" else set())


def test_the_metadata_says_all_that_was_set(tmp_path: Path) -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, alpha=3.5, layout="paper", rank_mode="r"), bn_policy="batch")
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    metadata = load_adapter(tmp_path / FILE).metadata
    assert metadata.pop("producer").startswith("lorac-deploy ")
    assert metadata == {
        "format": "lorac-adapter",
        "schema": "1",
        "model": "tiny",
        "method": "lora-c",
        "layout": "paper",
        "r": "1",
        "rank_mode": "r",
        "alpha": "3.5",
        "freeze_a": "false",
        "blocks": "",
        "bn_policy": "batch",
        "coordinates": "unfolded",
        "base_sha256": "",
    }


def test_a_file_holds_a_frozen_a_and_says_so(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    attach(net, LoraConfig(rank=1, freeze_a=True, blocks=("2", "5")))
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    file = load_adapter(tmp_path / FILE)
    assert (file.metadata["freeze_a"], file.metadata["blocks"]) == ("true", "2,5")
    np.testing.assert_array_equal(file.tensors["2.lora_a"], net[2].lora_a.detach())
    found = attach_adapter(tmp_path / FILE, other)
    assert (found.config.freeze_a, found.config.blocks) == (True, ("2", "5"))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["2.lora_b", "5.lora_b"]


def test_files_of_full_training_in_part_are_attached_as_such(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    select_trainable(net, "full", LoraConfig(blocks=("2",)))
    touch_adapters(net)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    assert set(load_adapter(tmp_path / FILE).tensors) == {"2.weight", "2.bias"}
    attach_adapter(tmp_path / FILE, other)
    assert torch.equal(other(images()), net.eval()(images()))


def test_tensors_are_written_as_float32_whatever_the_network_is(tmp_path: Path) -> None:
    net = tiny().double()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    assert {v.dtype for v in load_adapter(tmp_path / FILE).tensors.values()} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (tiny(), "unfolded"),
        (fold_batchnorm(tiny()), "folded"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), "folded"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Linear(4, 2)), "folded"),
        (DataDependent(*tiny()), "unfolded"),
        (DataDependent(*fold_batchnorm(tiny())), "folded"),
    ],
    ids=["pairs", "folded", "no BN", "BN alone", "not traceable", "not traceable, no BN"],
)
def test_coordinates_are_unfolded_where_an_export_would_fold(net: nn.Module, expected: str) -> None:
    assert coordinates(net) == expected


def test_an_unfolded_adapter_is_refused_by_a_network_without_bn_to_fold(tmp_path: Path) -> None:
    net = tiny()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    with pytest.raises(AdapterError, match="the file adds to weights before BN folding"):
        attach_adapter(tmp_path / FILE, fold_batchnorm(tiny()))


@pytest.mark.parametrize(("policy", "expected"), [("frozen", "folded"), ("batch", "unfolded")])
def test_under_batch_a_device_never_folds_so_the_file_says_unfolded(tmp_path: Path, policy: Any, expected: str) -> None:
    """Here BN stands in front of the convolution, where no folding could absorb it."""
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Linear(8, 2)) for _ in range(2)]
    for net in nets:
        attach(net, SMALL, bn_policy=policy)
    save_module_adapter(tmp_path / FILE, nets[0], model="tiny")
    assert load_adapter(tmp_path / FILE).metadata["coordinates"] == expected
    load_module_adapter(tmp_path / FILE, nets[1])
    assert torch.equal(nets[1][0].weight, nets[0][0].weight)


CONFIGS = [
    SMALL,
    LoraConfig(rank=2, alpha=1.5, layout="paper", rank_mode="r"),
    LoraConfig(rank=1, learnable_alpha=True, biases="head"),
    LoraConfig(rank=4, biases="all", small_layers="full"),
    LoraConfig(rank=1, freeze_a=True, seed=7),
    LoraConfig(rank=1, blocks=("2", "8"), biases="all"),
    LoraConfig(rank=2, freeze_a=True, blocks=("0",)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_plain_network_is_prepared_as_the_file_says(tmp_path: Path, config: LoraConfig) -> None:
    net, other = tiny(), tiny()
    report = attach(net, config, bn_policy="batch")
    touch_adapters(net)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    found = attach_adapter(tmp_path / FILE, other)
    assert found.trainables == report.trainables
    assert found.adapters == report.adapters
    assert found.bn_policy == "batch"
    assert torch.equal(other.eval()(images()), net.eval()(images()))


@pytest.mark.parametrize("method", ["head", "full"])
def test_other_methods_are_attached_by_their_files_too(tmp_path: Path, method: str) -> None:
    net, other = tiny(), tiny()
    select_trainable(net, method, SMALL)
    touch_adapters(net)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    assert attach_adapter(tmp_path / FILE, other).method == method
    assert torch.equal(other(images()), net.eval()(images()))


def test_all_mismatches_of_settings_and_tensors_are_listed_and_nothing_changes(tmp_path: Path) -> None:
    net = tiny()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    rewrite(
        tmp_path / FILE,
        {"2.lora_a": None, "8.weight": np.zeros((4, 16), np.float32), "x": np.zeros(1, np.float32)},
        layout="paper",
        alpha="7.0",
        r="2",
        method="full",
    )
    before = adapter_tensors(net)
    with pytest.raises(AdapterError) as error:
        load_module_adapter(tmp_path / FILE, net)
    assert str(error.value).splitlines()[1:] == [
        "  - method: the file says 'full', this network has 'lora-c'",
        "  - layout: the file says 'paper', this network has 'spatial'",
        "  - r: the file says '2', this network has '1'",
        "  - alpha: the file says '7.0', this network has '2.0'",
        "  - 2.lora_a is missing",
        "  - 8.weight has shape (4, 16), expected (5, 16)",
        "  - x is not trained in this network",
    ]
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(net).items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "format: the file says"),  # what save_adapter writes itself is changed below
        ({"coordinates": "sideways"}, "coordinates: expected 'folded' or 'unfolded', the file says 'sideways'"),
        ({"bn_policy": "batch"}, "bn_policy: the file says 'batch', this network has 'frozen'"),
        ({"alpha": "much"}, "alpha: the file says 'much'"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], text: str
) -> None:
    net = tiny()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    if "format" in change:
        monkeypatch.setattr("lorac_runtime.adapter.FORMAT", "other")
    rewrite(tmp_path / FILE, **change)
    with pytest.raises(AdapterError, match=text):
        load_module_adapter(tmp_path / FILE, net)


def test_a_learned_alpha_may_differ_from_the_setting(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    attach(net, LoraConfig(rank=1, alpha=3.0, learnable_alpha=True))
    attach(other, LoraConfig(rank=1, alpha=5.0, learnable_alpha=True))
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    load_module_adapter(tmp_path / FILE, other)
    assert other[2].lora_alpha.item() == 3.0


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"1.running_var": None}, "1.running_var is missing"),
        ({"1.running_var": np.full(8, -1, np.float32)}, "1.running_var holds values that no statistic has"),
        ({"3.running_mean": np.full(16, np.nan, np.float32)}, "3.running_mean holds values"),
        ({"3.running_mean": np.zeros(3, np.float32)}, r"3.running_mean has shape \(3,\), expected \(16,\)"),
    ],
)
def test_bad_statistics_are_refused_and_the_network_is_plain_again(
    tmp_path: Path, tensors: dict[str, Any], text: str
) -> None:
    net, other = tiny(), tiny()
    attach(net, SMALL, bn_policy="batch")
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    rewrite(tmp_path / FILE, tensors)
    with pytest.raises(AdapterError, match=text):
        attach_adapter(tmp_path / FILE, other)
    assert type(other[2]) is nn.Conv2d
    attach(other, SMALL)


def test_statistics_are_refused_where_bn_is_frozen(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    attach(net, SMALL, bn_policy="batch")
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    rewrite(tmp_path / FILE, bn_policy="frozen")
    with pytest.raises(AdapterError, match=r"1\.weight is BN's, which is frozen in this network"):
        attach_adapter(tmp_path / FILE, other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "magic"}, "cannot be attached to this network: method 'magic'"),
        ({"r": "two"}, "metadata cannot be used"),
        ({"rank_mode": "kr"}, "rank_mode 'kr'"),
    ],
)
def test_metadata_that_no_network_can_follow_is_refused(tmp_path: Path, change: dict[str, str], text: str) -> None:
    net, other = tiny(), tiny()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    rewrite(tmp_path / FILE, **change)
    with pytest.raises(AdapterError, match=text):
        attach_adapter(tmp_path / FILE, other)
    assert type(other[2]) is nn.Conv2d


def test_a_prepared_network_is_not_prepared_again(tmp_path: Path) -> None:
    net = tiny()
    attach(net, SMALL)
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    with pytest.raises(ValueError, match="already prepared"):
        attach_adapter(tmp_path / FILE, net)
    load_module_adapter(tmp_path / FILE, net)


def test_saving_needs_a_prepared_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not prepared for training"):
        save_module_adapter(tmp_path / FILE, tiny(), model="tiny")
    assert not (tmp_path / FILE).exists()
