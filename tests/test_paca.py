"""Method paca: which channels train, what the plan says, and PyTorch against a weight put together by a product."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldable import images, tiny
from networks import touch_adapters
from torch import Tensor, nn

from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, detach, fuse, report_of, select_trainable
from lorac_deploy.partial_layers import PartialConv2d, PartialLinear, take_channels
from lorac_exporters.methods import METHODS
from lorac_exporters.methods.paca import chosen_channels
from lorac_exporters.plan import Layer, Network
from lorac_runtime.manifest import Partial

SHARE = LoraConfig(share=0.4, seed=3)


def put_together(weight: Tensor, partial: Tensor, channels: tuple[int, ...]) -> Tensor:
    """``weight`` with ``partial`` in its places, by a product with a one-hot matrix."""
    places = torch.eye(weight.shape[1], dtype=weight.dtype)[list(channels)]
    return weight * (1 - places.sum(0)).reshape(1, -1, *[1] * (weight.ndim - 2)) + torch.einsum(
        "om...,mi->oi...", partial, places
    )


def test_channels_depend_on_layer_share_and_seed_alone() -> None:
    for count in (1, 2, 3, 16, 130):
        for share in (0.01, 0.25, 0.5, 1.0):
            found = chosen_channels("layer1.conv", count, share, 0)
            assert found == chosen_channels("layer1.conv", count, share, 0)
            assert len(found) == max(1, round(share * count))
            assert list(found) == sorted(set(found))
            assert set(found) <= set(range(count))
    assert chosen_channels("a", 64, 0.25, 0) != chosen_channels("b", 64, 0.25, 0)
    assert chosen_channels("a", 64, 0.25, 0) != chosen_channels("a", 64, 0.25, 1)
    assert set(chosen_channels("a", 64, 0.25, 0)) < set(chosen_channels("a", 64, 0.5, 0))


def test_over_many_layers_every_channel_is_chosen_alike() -> None:
    counts = np.bincount([c for n in range(800) for c in chosen_channels(f"layer{n}", 8, 0.25, 0)], minlength=8)
    assert abs(counts - 200).max() < 4 * np.sqrt(800 * 0.25 * 0.75)


NET = Network(
    convs=(
        Layer("stem", "stem.weight", None, (8, 3, 3, 3)),
        Layer("depthwise", "depthwise.weight", "depthwise.bias", (8, 1, 3, 3), groups=8),
        Layer("wide", "wide.weight", "wide.bias", (16, 8, 1, 1)),
        Layer("odd", "odd.weight", None, (4, 4, 3), obstacle="it is odd"),
    ),
    linears=(Layer("hidden", "hidden.weight", "hidden.bias", (12, 16)),),
    head_weight=("fc.weight", (4, 12)),
    head_bias=("fc.bias", (4,)),
    backbone_parameters=100,
)


def test_the_plan_says_what_trains_and_why_the_rest_does_not() -> None:
    plan = METHODS["paca"](NET, LoraConfig())
    assert [(t.name, t.shape, t.role) for t in plan.trainables] == [
        ("stem.partial", (8, 1, 3, 3), "partial"),
        ("wide.partial", (16, 2, 1, 1), "partial"),
        ("hidden.partial", (12, 4), "partial"),
        ("fc.weight", (4, 12), "weight"),
    ]
    assert [p.channels for p in plan.partials] == [
        chosen_channels(p.layer, p.weight_shape[1], 0.25, 0) for p in plan.partials
    ]
    assert [name for name, _ in plan.frozen] == ["depthwise", "odd"]
    assert dict(plan.frozen)["odd"] == "it is odd"


def test_small_layers_biases_blocks_and_share_change_the_plan() -> None:
    names = {
        key: [t.name for t in METHODS["paca"](NET, config).trainables]
        for key, config in {
            "full": LoraConfig(small_layers="full"),
            "head": LoraConfig(biases="head"),
            "all": LoraConfig(biases="all"),
            "blocks": LoraConfig(blocks=("wide",), biases="all"),
            "whole": LoraConfig(share=1.0),
        }.items()
    }
    partials = ["stem.partial", "wide.partial", "hidden.partial"]
    assert names["full"] == ["stem.partial", "depthwise.weight", "wide.partial", "hidden.partial", "fc.weight"]
    assert names["head"] == [*partials, "fc.weight", "fc.bias"]
    assert names["all"] == [*partials, "depthwise.bias", "wide.bias", "hidden.bias", "fc.weight", "fc.bias"]
    assert names["blocks"] == ["wide.partial", "wide.bias"]
    assert names["whole"] == ["stem.partial", "depthwise.partial", "wide.partial", "hidden.partial", "fc.weight"]
    assert METHODS["paca"](NET, LoraConfig(blocks=("wide",))).frozen[-1] == ("fc", "outside of the trained blocks")
    with pytest.raises(ValueError, match="has no adapters; choose 'frozen' or 'full'"):
        METHODS["paca"](NET, LoraConfig(small_layers="adapter"))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        LoraConfig(share=share)


# In PyTorch


def test_the_start_changes_nothing_and_detach_gives_the_network_back() -> None:
    net, plain = tiny(), tiny()
    report = select_trainable(net, "paca", LoraConfig(small_layers="full"))
    assert torch.equal(net(images()), plain(images()))
    assert [type(net[i]) for i in (0, 2, 5)] == [PartialConv2d] * 3
    assert "2 of 4 input channels train" not in repr(net[2])
    assert "1 of 4 input channels train" in repr(net[2])
    assert str(report).endswith("0 layers frozen; some channels of 3 layers")
    assert not net[2].weight.requires_grad
    touch_adapters(net)
    assert not torch.equal(net(images()), plain(images()))
    assert sorted(detach(net)) == ["0.partial", "2.partial", "5.partial", "8.weight"]
    assert [type(part) for part in net] == [type(part) for part in plain]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_the_fused_network_holds_the_trained_channels() -> None:
    net = tiny()
    select_trainable(net, "paca", SHARE)
    touch_adapters(net)
    fused = fuse(net)
    torch.testing.assert_close(fused(images()), net.eval()(images()))
    for partial in report_of(net).partials:
        own, new = (module.get_submodule(partial.layer).weight for module in (net, fused))
        trained = net.get_parameter(partial.tensor)
        assert torch.equal(new, put_together(own, trained, partial.channels))
    assert fused.state_dict().keys() == tiny().state_dict().keys()


def test_a_linear_layer_and_a_circular_convolution_train_in_part() -> None:
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, 6)
    for layer, data in ((linear, x), (conv, torch.randn(2, 6, 5, 5))):
        plain = copy.deepcopy(layer)
        shape = tuple(layer.weight.shape)
        made: Any = take_channels(layer, Partial("", "weight", "partial", shape, 1, (0, 4)))
        with torch.no_grad():
            made.partial += 1
            plain.weight[:, [0, 4]] += 1
        torch.testing.assert_close(made(data), plain(data))
    assert isinstance(linear, PartialLinear)
    with pytest.raises(TypeError, match="got ConvTranspose2d"):
        take_channels(nn.ConvTranspose2d(4, 4, 3), Partial("", "weight", "partial", (4, 4, 3, 3), 1, (0,)))


def test_a_prepared_network_is_no_checkpoint_and_cannot_be_folded(tmp_path: Path) -> None:
    net = tiny()
    select_trainable(net, "paca", SHARE)
    with pytest.raises(ValueError, match="fold first, then attach"):
        fold_batchnorm(net)
    with pytest.raises(ValueError, match="already prepared"):
        select_trainable(net, "full", SHARE)
    with pytest.raises(ValueError, match="a checkpoint holds a plain network"):
        save_checkpoint(tmp_path, net, None, input_spec=None, class_names=(), metrics={})  # type: ignore[arg-type]
