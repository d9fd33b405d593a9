"""What the settings of attach and select_trainable change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import touch_adapters
from small_network import SMALL, assert_same_state, images, snapshot, step, tiny
from torch import nn

from lorac_deploy.lora import (
    AttachReport,
    LoraConfig,
    LoraConv1d,
    LoraConv2d,
    adapter_tensors,
    attach,
    detach,
    fuse,
    load_adapter_tensors,
    select_trainable,
)
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.delta import LAYOUTS
from lorac_runtime.errors import AdapterError


def test_layouts_give_different_networks_from_the_same_factors() -> None:
    outputs = []
    for layout in LAYOUTS:
        net = tiny()
        attach(net, LoraConfig(rank=1, layout=layout))
        touch_adapters(net, size=0.5)
        outputs.append(net.eval()(images()))
    assert not torch.allclose(*outputs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("biases", "expected"), [("none", []), ("head", ["8.bias"]), ("all", ["2.bias", "4.bias", "8.bias"])]
)
def test_biases_that_exist_train_as_asked(biases: Any, expected: list[str]) -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, biases=biases))
    assert [n for n, p in net.named_parameters() if p.requires_grad and n.endswith("bias")] == expected


def test_small_layers_are_frozen_trained_in_full_or_adapted_as_asked() -> None:
    trains = {}
    for choice in ("frozen", "full", "adapter"):
        net = tiny()
        attach(net, LoraConfig(rank=1, small_layers=choice))  # type: ignore[arg-type]
        trains[choice] = [n for n, p in net.named_parameters() if p.requires_grad and n.startswith("4.")]
    assert trains == {"frozen": [], "full": ["4.weight"], "adapter": ["4.lora_a", "4.lora_b"]}


def test_rank_alpha_and_seed_reach_the_layers() -> None:
    net = tiny()
    attach(net, LoraConfig(rank=2, alpha=3.0, rank_mode="r", seed=1))
    layer = net[2]
    assert (tuple(layer.lora_a.shape), tuple(layer.lora_b.shape), layer.scale) == ((2, 24), (24, 2), 1.5)
    others = [tiny(), tiny()]
    for other, seed in zip(others, (1, 2), strict=True):
        attach(other, LoraConfig(rank=2, rank_mode="r", seed=seed))
    assert torch.equal(layer.lora_a, others[0][2].lora_a)
    assert not torch.equal(layer.lora_a, others[1][2].lora_a)


def test_attaching_draws_no_global_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    net = tiny()
    torch.manual_seed(5)
    attach(net, SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_one_dimensional_convolutions_are_adapted() -> None:
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 8, 3))
    report = attach(net, SMALL)
    assert type(net[1]) is LoraConv1d
    assert report.adapters[0].weight_shape == (8, 8, 3)
    touch_adapters(net)
    x = torch.randn(2, 2, 12)
    assert torch.equal(fuse(net)(x), net(x))


def test_a_convolutional_head_trains_in_full() -> None:
    net = build(ModelSpec("squeezenet1_1", classes=10))
    report = attach(net, LoraConfig(biases="head"))
    assert report.head == "classifier.1"
    assert report.full == ("features.0.weight", "classifier.1.weight", "classifier.1.bias")
    assert type(net.get_submodule("classifier.1")) is nn.Conv2d


def test_stem_and_head_can_be_named() -> None:
    net = tiny()
    report = attach(net, SMALL, stem="2", head="5")
    assert report.full == ("2.weight", "5.weight")
    assert [a.layer for a in report.adapters] == ["0"]
    reason = "fully connected: beside convolutions it gets an adapter only with the setting linear"
    assert report.frozen[-1] == ("8", reason)


def test_shared_and_transposed_convolutions_stay_frozen_with_the_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 2)
    )
    net[2].weight = net[1].weight
    assert attach(net, SMALL).frozen == (
        ("1", "its weight is shared with 2"),
        ("2", "its weight is shared with 1"),
        ("3", "transposed convolutions take no adapter"),
    )
    assert not net[1].weight.requires_grad
    assert not net[3].weight.requires_grad


def trained_by(method: str, policy: Any, net: nn.Module) -> tuple[AttachReport, set[str]]:
    report = select_trainable(net, method, SMALL, bn_policy=policy)
    learning = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learning == {t.name for t in report.trainables}
    return report, learning


def test_method_head_trains_weight_and_bias_of_the_head() -> None:
    report, learning = trained_by("head", "frozen", tiny())
    assert learning == {"8.weight", "8.bias"}
    assert (report.trained_parameters, report.adapters) == (85, ())
    assert [name for name, _ in report.frozen] == ["0", "2", "4", "5"]


def test_method_full_trains_everything_and_the_affine_part_of_bn_only_under_batch() -> None:
    everything = {name for name, _ in build(ModelSpec("mobilenet_v3_small", 10)).named_parameters()}
    _, learning = trained_by("full", "batch", build(ModelSpec("mobilenet_v3_small", 10)))
    assert learning == everything
    net = build(ModelSpec("mobilenet_v3_small", 10))
    affine = {
        f"{n}.{leaf}" for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) for leaf in ("weight", "bias")
    }
    _, learning = trained_by("full", "frozen", net)
    assert learning == everything - affine


@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_bn_follows_the_policy_while_attached_and_is_ordinary_afterwards(policy: Any) -> None:
    net = tiny()
    attach(net, SMALL, bn_policy=policy)
    assert net.train()[1].training is (policy == "batch")
    assert fuse(net).train()[1].training
    detach(net)
    assert net.train()[1].training


def test_unknown_methods_and_policies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'lora' is not one of lora-c, .*full"):
        select_trainable(tiny(), "lora", SMALL)
    with pytest.raises(ValueError, match="BN policy 'none' is not one of frozen, batch, recalibrate"):
        attach(tiny(), SMALL, bn_policy="none")  # type: ignore[arg-type]


FROZEN_A = LoraConfig(rank=1, freeze_a=True)


def test_a_frozen_a_gets_no_gradient_and_stays_while_b_moves() -> None:
    net = tiny()
    attach(net, FROZEN_A)
    before = snapshot(net)
    step(net.train())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "2.lora_b", "5.lora_b", "8.weight"}
    assert net[2].lora_a.grad is None
    assert not net[2].lora_a.requires_grad
    assert net[2].lora_b.grad.abs().max() > 0


def test_the_gradient_of_b_does_not_depend_on_whether_a_trains() -> None:
    gradients = []
    for config in (SMALL, FROZEN_A):
        net = tiny()
        attach(net, config)
        step(net.train())
        gradients.append(net[2].lora_b.grad)
    assert torch.equal(*gradients)


def test_a_frozen_a_is_part_of_the_adapter_and_is_loaded_with_it() -> None:
    net, other = tiny(), tiny()
    attach(net, FROZEN_A)
    step(net.train())
    tensors = adapter_tensors(net)
    assert set(tensors) == {"0.weight", "2.lora_a", "2.lora_b", "5.lora_a", "5.lora_b", "8.weight"}
    attach(other, LoraConfig(rank=1, freeze_a=True, seed=9))
    with pytest.raises(AdapterError, match=r"2\.lora_a is missing"):
        load_adapter_tensors(other, {n: v for n, v in tensors.items() if n != "2.lora_a"})
    load_adapter_tensors(other, tensors)
    assert torch.equal(other.eval()(images()), net.eval()(images()))
    assert not other[2].lora_a.requires_grad


@pytest.mark.parametrize("config", [FROZEN_A, LoraConfig(rank=1, blocks=("5", "8")), LoraConfig(blocks=("0", "8"))])
def test_networks_trained_in_part_are_fused_and_detached_like_others(config: LoraConfig) -> None:
    net = tiny()
    before = snapshot(net)
    attach(net, config)
    step(net.train())
    expected = net.eval()(images())
    fused = fuse(net)
    assert torch.equal(fused(images()), expected)
    assert list(fused.state_dict()) == list(before)
    detach(net)
    assert_same_state(net, before)
    assert not torch.allclose(net.eval()(images()), expected, rtol=0, atol=1e-4)
    assert all(p.requires_grad for p in net.parameters())


def test_blocks_leave_the_layers_outside_plain_and_frozen() -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, blocks=("5",)))
    assert [type(net[i]) for i in (2, 5)] == [nn.Conv2d, LoraConv2d]
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["5.lora_a", "5.lora_b"]
    step(net.train())
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["5.lora_a", "5.lora_b"]


def test_blocks_hold_for_full_training_and_are_refused_for_the_head_alone() -> None:
    net = tiny()
    report = select_trainable(net, "full", LoraConfig(blocks=("0", "1", "2")), bn_policy="batch")
    learning = [n for n, p in net.named_parameters() if p.requires_grad]
    assert learning == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert [name for name, _ in report.frozen] == ["4", "5", "8"]
    with pytest.raises(ValueError, match="method head trains the head alone"):
        select_trainable(tiny(), "head", LoraConfig(blocks=("2",)))


def test_a_network_without_the_block_stays_plain() -> None:
    net = tiny()
    before = snapshot(net)
    with pytest.raises(ValueError, match="'layer4' holds no layer that could train: there are 0, 2, 4, 5, 8"):
        attach(net, LoraConfig(blocks=("layer4",)))
    assert_same_state(net, before)
    attach(net, SMALL)
