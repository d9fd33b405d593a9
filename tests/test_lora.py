"""attach, detach and fuse on whole networks."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from networks import touch_adapters, trained
from small_network import SMALL, assert_same_state, images, snapshot, step, tiny
from torch import Tensor, nn

from lorac_deploy.lora import (
    METHODS,
    LoraConfig,
    LoraConv2d,
    adapter_tensors,
    attach,
    detach,
    fuse,
    load_adapter_tensors,
    report_of,
    select_trainable,
)
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.errors import AdapterError


def test_everything_but_stem_adapters_and_head_weight_stops_training() -> None:
    net = tiny()
    report = attach(net, SMALL)
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learning == ["0.weight", "2.lora_a", "2.lora_b", "5.lora_a", "5.lora_b", "8.weight"]
    assert sorted(learning) == sorted(t.name for t in report.trainables)
    assert [a.layer for a in report.adapters] == ["2", "5"]
    assert report.full == ("0.weight", "8.weight")
    assert [name for name, _ in report.frozen] == ["4"]
    assert type(net[2]) is LoraConv2d
    assert type(net[4]) is nn.Conv2d


def test_one_step_moves_exactly_the_trainable_tensors() -> None:
    net = tiny()
    report = attach(net, SMALL)
    touch_adapters(net)
    before = snapshot(net)
    step(net.train())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {t.name for t in report.trainables}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_fresh_adapter_changes_no_bit_of_a_networks_output(name: str) -> None:
    net = trained(name) if name != "squeezenet1_1" else build(ModelSpec(name, 10)).eval()
    expected = net(images(2, 64))
    attach(net, LoraConfig())
    assert torch.equal(net(images(2, 64)), expected)
    touch_adapters(net)
    assert not torch.allclose(net(images(2, 64)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_fused_network_is_plain_and_gives_the_adapted_outputs(name: str, layout: Layout) -> None:
    net = trained(name)
    plain = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    kinds = [type(part) for part in net.modules()]
    attach(net, LoraConfig(layout=layout, small_layers="full"))
    touch_adapters(net)
    before, x = snapshot(net), images(2, 32)
    fused = fuse(net)
    assert {key: tuple(value.shape) for key, value in fused.state_dict().items()} == plain
    assert [type(part) for part in fused.modules()] == kinds
    assert torch.equal(fused(x), net.eval()(x))
    assert_same_state(net, before)
    with torch.no_grad():
        next(fused.parameters()).zero_()
    assert_same_state(net, before)


@pytest.mark.parametrize(
    ("method", "policy"),
    [(name, policy) for name, method in METHODS.items() if method.trains for policy in method.bn_policies],
)
def test_detach_restores_the_network_to_the_bit_after_training(method: str, policy: Any) -> None:
    net = tiny()
    net[2].bias.requires_grad_(False)
    before, kinds = snapshot(net), [type(m) for m in net.modules()]
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    attributes = {name: set(vars(m)) for name, m in net.named_modules()}
    blocks = (next(name for name, m in net.named_modules() if isinstance(m, nn.Linear)),) if method == "blocks" else ()
    select_trainable(net, method, dataclasses.replace(SMALL, blocks=blocks), bn_policy=policy)
    step(net.train())
    tensors = adapter_tensors(net)
    detached = detach(net)
    assert all(torch.equal(detached[name], value) for name, value in tensors.items())
    assert_same_state(net, before)
    assert [type(m) for m in net.modules()] == kinds
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes


def test_detached_tensors_loaded_into_a_fresh_adapter_give_the_same_network() -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, learnable_alpha=True))
    touch_adapters(net)
    expected = net.eval()(images())
    tensors = detach(net)
    attach(net, LoraConfig(rank=1, learnable_alpha=True, seed=9))
    assert not torch.equal(net.eval()(images()), expected)
    load_adapter_tensors(net, tensors)
    assert torch.equal(net(images()), expected)


def test_adapter_tensors_are_copies() -> None:
    net = tiny()
    attach(net, SMALL)
    tensors = adapter_tensors(net)
    touch_adapters(net)
    assert not any(torch.equal(value, net.get_parameter(name)) for name, value in tensors.items())


def test_all_mismatches_of_loaded_tensors_are_listed_and_nothing_changes() -> None:
    net = tiny()
    attach(net, SMALL)
    tensors, before = adapter_tensors(net), snapshot(net)
    del tensors["2.lora_a"]
    tensors |= {"9.lora_a": torch.ones(1), "2.lora_b": torch.ones(3, 3), "5.lora_b": torch.full((16, 1), torch.nan)}
    with pytest.raises(AdapterError) as error:
        load_adapter_tensors(net, tensors)
    assert str(error.value).splitlines()[1:] == [
        "  - 2.lora_a is missing",
        "  - 2.lora_b has shape (3, 3), expected (24, 3)",
        "  - 5.lora_b holds NaN or infinite values",
        "  - 9.lora_a is not trained in this network",
    ]
    assert_same_state(net, before)


class ListedTwice(nn.Module):
    """Holds its second convolution in a plain list besides, as some detection networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.reversed = [self.body, self.stem]

    def forward(self, x: Tensor) -> Tensor:
        for conv in reversed(self.reversed):
            x = conv(x)
        return self.fc(x.mean((2, 3)))


def test_a_layer_that_is_reached_by_another_reference_is_adapted_too() -> None:
    net = ListedTwice()
    expected = net(images())
    attach(net, SMALL)
    with torch.no_grad():
        net.body.lora_b.fill_(0.1)
    assert not torch.allclose(net(images()), expected)
    assert torch.equal(fuse(net)(images()), net(images()))


def test_attaching_twice_is_refused_with_what_to_do() -> None:
    net = tiny()
    attach(net, SMALL)
    for again in (net, nn.Sequential(net)):
        with pytest.raises(ValueError, match=r"already prepared for training.*detach\(module\) first"):
            attach(again, SMALL)
    detach(net)
    attach(net, SMALL)


@pytest.mark.parametrize("call", [detach, fuse, adapter_tensors, report_of])
def test_a_network_without_adapters_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"not prepared for training: call attach\(module"):
        call(tiny())


def test_a_network_that_cannot_be_attached_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="1 keeps no running statistics"):
        attach(net, SMALL)
    assert all(p.requires_grad for p in net.parameters())
    attach(net, SMALL, bn_policy="batch")


def test_train_and_eval_of_an_attached_network_touch_no_tensor() -> None:
    net = tiny()
    attach(net, SMALL, bn_policy="batch")
    before = snapshot(net)
    net.eval().train().eval()
    assert_same_state(net, before)


def test_copies_and_pickles_of_an_attached_network_compute_the_same_and_detach_by_themselves() -> None:
    net = tiny()
    plain = snapshot(net)
    attach(net, SMALL)
    touch_adapters(net)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        assert torch.equal(twin.eval()(images()), net.eval()(images()))
        assert detach(twin).keys() == adapter_tensors(net).keys()
        assert_same_state(twin, plain)
    assert isinstance(net[2], LoraConv2d)


def test_an_attached_network_can_change_its_type_and_be_exported() -> None:
    net = tiny()
    attach(net, SMALL)
    touch_adapters(net)
    net.eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(7)), net(images(7)))
    expected = net(images())
    torch.testing.assert_close(net.double()(images().double()).float(), expected)
    detach(net)
    assert all(value.dtype == torch.float64 for value in net.state_dict().values() if value.is_floating_point())
