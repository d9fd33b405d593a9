"""Modules on a PyTorch network: they change nothing at first, work in copies, and go away without a trace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from module_networks import NETWORKS, graphs_of, network, samples
from networks import touch_adapters
from step_runs import Case
from torch import Tensor, nn

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.lora import (
    LoraConfig,
    adapter_tensors,
    detach,
    fuse,
    load_adapter_tensors,
    report_of,
    select_trainable,
)
from lorac_runtime.errors import AdapterError
from lorac_runtime.manifest import TrainingDefaults

METHODS = ("skip", "attention")
CONFIG = LoraConfig(rank=2, reduction=2)


def attached(name: str, method: str, config: LoraConfig = CONFIG, *, size: float = 0.0) -> nn.Module:
    net = copy.deepcopy(network(name))
    select_trainable(net, method, config)
    touch_adapters(net, size=size)
    return net


def inputs(name: str, count: int = 3) -> Tensor:
    return torch.from_numpy(samples(name, count)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_modules_change_no_output_until_they_are_trained_then_they_do(name: str, method: str) -> None:
    x, net = inputs(name), attached(name, method)
    expected = network(name)(x)
    assert torch.equal(net(x), expected)
    touch_adapters(net, size=0.2)
    assert (net(x) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_those_of_the_exporters_plan(name: str, method: str) -> None:
    report = report_of(attached(name, method))
    plan = graphs_of(name, Case(TrainingDefaults(), lora=CONFIG, method=method)).plan
    assert set(report.trainables) == set(plan.trainables)
    assert {m.layer for m in report.modules} == {m.layer for m in plan.modules}
    assert report.trained_parameters == plan.trained_parameters


@pytest.mark.parametrize("method", METHODS)
def test_detaching_leaves_no_trace(method: str) -> None:
    net = attached("residual", method, size=0.2)
    before, x = network("residual"), inputs("residual")
    tensors = detach(net)
    assert tensors.keys() == {t.name for t in report_of(attached("residual", method)).trainables}
    assert list(net.state_dict()) == list(before.state_dict())
    assert torch.equal(net(x), before(x))
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in net.modules())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_has_modules_of_its_own(method: str) -> None:
    net, x = attached("residual", method, size=0.2), inputs("residual")
    expected, twin = net(x), copy.deepcopy(net)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(net(x), expected)
    assert not torch.equal(twin(x), expected)
    detach(twin)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_come_back_as_they_were(method: str) -> None:
    net, x = attached("depthwise", method, size=0.2), inputs("depthwise")
    twin = attached("depthwise", method)
    load_adapter_tensors(twin, adapter_tensors(net))
    assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_file_says_all_that_is_needed_to_attach_it(method: str, tmp_path: Path) -> None:
    config = LoraConfig(rank=3, alpha=1.5, reduction=2) if method == "skip" else LoraConfig(reduction=2)
    net, x = attached("residual", method, config, size=0.2), inputs("residual")
    save_module_adapter(tmp_path / "a.safetensors", net, model="net")
    other = copy.deepcopy(network("residual"))
    attach_adapter(tmp_path / "a.safetensors", other)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [("skip", LoraConfig(rank=2, alpha=9.0), "alpha"), ("attention", LoraConfig(reduction=3), "reduction")],
)
def test_a_file_of_other_settings_is_refused(method: str, config: LoraConfig, message: str, tmp_path: Path) -> None:
    save_module_adapter(tmp_path / "a.safetensors", attached("residual", method), model="net")
    with pytest.raises(AdapterError, match=message):
        load_module_adapter(tmp_path / "a.safetensors", attached("residual", method, config))


@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_plain_network_to_fuse_into(method: str) -> None:
    with pytest.raises(ValueError, match=rf"method {method} adds layers of its own at 4 places.*export an artifact"):
        fuse(attached("residual", method))


@pytest.mark.parametrize("method", METHODS)
def test_only_modules_inside_of_the_blocks_exist(method: str) -> None:
    report = report_of(attached("residual", method, LoraConfig(rank=2, blocks=("layer2", "fc"))))
    assert [m.layer for m in report.modules] == ["layer2.0.conv1", "fc"]
    report = report_of(attached("residual", method, LoraConfig(rank=2, blocks=("layer3",))))
    assert [m.layer for m in report.modules] == ["layer3.0.conv1"]
    assert {t.name.rpartition(".")[0] for t in report.trainables} == {"layer3.0.conv1"}


@pytest.mark.parametrize("method", METHODS)
def test_blocks_without_a_site_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method} would train nothing in blocks layer2.0.conv2"):
        attached("residual", method, LoraConfig(rank=2, blocks=("layer2.0.conv2",)))
    with pytest.raises(ValueError, match="'layer9' holds no layer"):
        attached("residual", method, LoraConfig(rank=2, blocks=("layer9",)))


def test_a_skip_adapter_needs_one_input_a_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
            self.times = 2

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            for _ in range(self.times):
                x = self.conv2(x)
            logits: Tensor = self.fc(x.mean((2, 3)))
            return logits

    net = Twice()
    select_trainable(net, "skip", CONFIG)
    with pytest.raises(ValueError, match="conv2 is called twice in a forward pass"):
        net(torch.zeros(1, 3, 8, 8))
    net.times = 1
    net(torch.zeros(1, 3, 8, 8))  # what the failed pass left is forgotten
    net.times = 0
    with pytest.raises(ValueError, match="conv2 did not run before the head"):
        net(torch.zeros(1, 3, 8, 8))
