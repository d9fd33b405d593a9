"""A device's adapter in the network before folding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldable import FILE, SMALL, DataDependent, images, rewrite, tiny
from networks import touch_adapters, trained
from torch import Tensor, nn

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.batchnorm import bn_tensors
from lorac_deploy.folding import conv_bn_pairs, fold_batchnorm
from lorac_deploy.lora import LoraConfig, attach, fuse, report_of
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.errors import AdapterError


def from_device(path: Path, net: nn.Module, config: LoraConfig = SMALL, *, policy: Any = "frozen") -> Tensor:
    """Write what a device would after training: folded coordinates, touched. Returns the device's outputs."""
    device = fold_batchnorm(net)
    attach(device, config)
    touch_adapters(device, size=0.1)
    save_module_adapter(path, device, model="tiny")
    if policy != "frozen":
        file = load_adapter(path)
        tensors = file.tensors | {n: t.numpy() for n, t in bn_tensors(net).items()}
        save_adapter(path, tensors, file.metadata | {"bn_policy": policy})
    return device(images())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["frozen", "recalibrate"])
def test_a_devices_adapter_gives_the_devices_outputs_in_the_unfolded_network(
    tmp_path: Path, layout: Layout, policy: Any
) -> None:
    config = LoraConfig(rank=1, layout=layout)
    expected = from_device(tmp_path / FILE, tiny(), config, policy=policy)
    net = tiny()
    attach(net, config, bn_policy=policy)
    load_module_adapter(tmp_path / FILE, net)
    torch.testing.assert_close(net(images()), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))
    file = load_adapter(tmp_path / FILE)
    assert not np.allclose(net[2].lora_b.detach().numpy(), file.tensors["2.lora_b"], atol=1e-3)
    assert np.array_equal(net[2].lora_a.detach().numpy(), file.tensors["2.lora_a"])
    torch.testing.assert_close(fuse(net)(images()), net(images()))


def test_statistics_in_the_file_decide_how_it_is_unfolded(tmp_path: Path) -> None:
    """A device under `recalibrate` folds with its own statistics; the network here has others."""
    recalibrated = tiny()
    for layer in (recalibrated[1], recalibrated[3]):
        layer.running_var *= 3
        layer.running_mean += 1
    expected = from_device(tmp_path / FILE, recalibrated, policy="recalibrate")
    net = tiny()
    attach(net, SMALL, bn_policy="recalibrate")
    load_module_adapter(tmp_path / FILE, net)
    torch.testing.assert_close(net(images()), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))
    assert torch.equal(net[1].running_var, recalibrated[1].running_var)


def test_a_resnets_device_adapter_comes_back(tmp_path: Path) -> None:
    net, x = trained("resnet18"), torch.randn(2, 3, 32, 32)
    device = fold_batchnorm(net)
    attach(device, LoraConfig())
    touch_adapters(device)
    save_module_adapter(tmp_path / FILE, device, model="resnet18")
    report = attach_adapter(tmp_path / FILE, net)
    assert report.trained_parameters == report_of(device).trained_parameters
    expected = device(x)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_trained_biases_of_convolutions_that_have_one_are_unfolded(tmp_path: Path) -> None:
    config = LoraConfig(rank=1, biases="all")
    net = tiny()
    net[0] = nn.Conv2d(3, 8, 3)
    expected = from_device(tmp_path / FILE, net, config)
    attach(net, config)
    load_module_adapter(tmp_path / FILE, net)
    torch.testing.assert_close(net(images()), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_trained_biases_of_convolutions_without_one_need_the_folded_network(tmp_path: Path) -> None:
    config = LoraConfig(rank=1, biases="all")
    expected = from_device(tmp_path / FILE, tiny(), config)
    net = tiny()
    attach(net, config)
    with pytest.raises(AdapterError, match=r"(?s)0.bias is not trained in this network.*use fold_batchnorm\(network\)"):
        load_module_adapter(tmp_path / FILE, net)
    folded = fold_batchnorm(tiny())
    attach_adapter(tmp_path / FILE, folded)
    assert torch.equal(folded(images()), expected)


@pytest.mark.parametrize("g", [1e-6, 1e-11])
def test_small_factors_are_no_obstacle(tmp_path: Path, g: float) -> None:
    nets = [tiny(), tiny()]
    for net in nets:
        net[1].weight.data[3] = net[3].weight.data[5] = g
    expected = from_device(tmp_path / FILE, nets[0])
    attach_adapter(tmp_path / FILE, nets[1])
    torch.testing.assert_close(nets[1](images()), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("g", [0.0, 1e-14])
def test_rows_trained_where_the_factor_is_near_zero_are_refused_with_advice(tmp_path: Path, g: float) -> None:
    nets = [tiny(), tiny()]
    for net in nets:
        net[1].weight.data[3] = net[3].weight.data[5] = g
    expected = from_device(tmp_path / FILE, nets[0])
    before = {name: value.clone() for name, value in nets[1].state_dict().items()}
    with pytest.raises(AdapterError) as error:
        attach_adapter(tmp_path / FILE, nets[1])
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["  - 0.weight", "  - 2.lora_b"]
    assert "1 rows were trained where gamma / sigma of 1 is near zero" in lines[0]
    assert "3 rows" in lines[1]  # one output channel, three kernel rows
    assert "use the fused file, or load the adapter into fold_batchnorm(network)" in lines[1]
    assert all(torch.equal(value, before[name]) for name, value in nets[1].state_dict().items())
    folded = fold_batchnorm(nets[1])
    attach_adapter(tmp_path / FILE, folded)
    assert torch.equal(folded(images()), expected)


def test_untrained_rows_pass_where_the_factor_is_zero(tmp_path: Path) -> None:
    net = tiny()
    net[1].weight.data[3] = net[3].weight.data[5] = 0.0
    net[1].weight.data[4] = 1e-14
    device = fold_batchnorm(net)
    attach(device, LoraConfig(rank=1, biases="all"))
    save_module_adapter(tmp_path / FILE, device, model="tiny")
    rewrite(tmp_path / FILE, {"0.bias": None})
    own, bias = net[0].weight.clone(), net[2].bias.clone()
    attach_adapter(tmp_path / FILE, net)
    torch.testing.assert_close(net[0].weight, own)
    torch.testing.assert_close(net[2].bias, bias)


def test_pairs_can_be_given_where_the_forward_pass_cannot_be_followed(tmp_path: Path) -> None:
    expected = from_device(tmp_path / FILE, tiny())
    net = DataDependent(*tiny())
    attach_adapter(tmp_path / FILE, net, pairs=conv_bn_pairs(tiny()))
    torch.testing.assert_close(nn.Sequential.forward(net, images()), expected, rtol=0, atol=1e-4)
