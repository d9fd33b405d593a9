"""timm's own layers: attached, folded, standardized, and stepped by the engine as PyTorch steps them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_steps import SGD, check_steps, sample
from step_runs import Case
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy import timm_nets
from lorac_deploy.batchnorm import apply_policy, recalibrate, restore_policy
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, attach, detach, fuse
from lorac_deploy.lora_layers import LayerAdapter, LoraConv2d, adapt, merge
from lorac_deploy.partial_layers import release_channels, take_channels
from lorac_deploy.shared_batchnorm import shared_statistics
from lorac_exporters.inject import count_parameters
from lorac_runtime.manifest import Partial

layers: Any = pytest.importorskip("timm.layers")
SHAPE = (3, 14, 14)


def around(block: nn.Module) -> nn.Module:
    """A network whose middle is ``block``, which takes 8 channels; the convolution behind it takes what it gives."""
    with torch.no_grad():
        channels = block.eval()(torch.zeros(2, 8, 14, 14)).shape[1]
    stem, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 12, 3)
    return nn.Sequential(stem, block, last, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


def same_padded() -> nn.Module:
    """Uneven padding: 14 and 7 pixels with stride 2 and a kernel of 3 or 5."""
    first = layers.Conv2dSame(8, 12, 3, stride=2, bias=False)
    second = layers.Conv2dSame(12, 12, 5, stride=2, groups=2)
    smooth = {"act_layer": nn.SiLU, "inplace": False}
    norms = [layers.BatchNormAct2d(12, **smooth) for _ in range(2)]
    return nn.Sequential(first, norms[0], second, norms[1])


def mobileone() -> nn.Module:
    from timm.models.byobnet import LayerFn, MobileOneBlock

    return MobileOneBlock(8, 8, 3, num_conv_branches=2, layers=LayerFn(act=nn.SiLU))


def convnext(**options: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXtBlock

    return lively(ConvNeXtBlock(8, **options))


def lively(block: nn.Module) -> nn.Module:
    """Scales and shifts that start at zero, or nearly, moved away from it."""
    for value in block.parameters():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.3, 1.0)
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "same padding, BN with activation": same_padded,
    "several branches": mobileone,
    "layer norm, GELU, layer scale": convnext,
    "global response norm": lambda: convnext(use_grn=True, ls_init_value=None, conv_mlp=True),
    "squeeze and excitation": lambda: layers.SqueezeExcite(8, rd_channels=4, act_layer=nn.Tanh),
    "efficient channel attention": lambda: layers.EcaModule(8),
    "split attention": lambda: layers.SplitAttn(8, act_layer=nn.SiLU, norm_layer=nn.BatchNorm2d),
    "global context": lambda: lively(layers.GlobalContext(8, rd_channels=4, act_layer=nn.Tanh)),
    "blur pooling": lambda: layers.BlurPool2d(8),
    "average pooling, same padding": lambda: layers.AvgPool2dSame(3, 2),
    "group norm with activation": lambda: layers.GroupNormAct(8, 2, act_layer=nn.SiLU),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_through_it_is_pytorchs(name: str) -> None:
    torch.manual_seed(0)
    net = timm_nets.stem_first(around(BLOCKS[name]()), SHAPE)
    check_steps(sample(net, SHAPE, 4), Case(SGD, lora=LoraConfig(rank=2, small_layers="adapter")))


def test_the_filter_of_blur_pooling_is_no_parameter_and_never_trains() -> None:
    torch.manual_seed(0)
    given = sample(around(layers.BlurPool2d(8)), SHAPE, 4)
    graphs = check_steps(given, Case(SGD, method="full"))
    assert ("1.filt", "its weight is a fixed filter, no parameter of the network") in graphs.plan.frozen
    assert count_parameters(graphs.original) == sum(p.numel() for p in given.net.parameters())


def test_a_standardizing_convolution_becomes_a_plain_one_with_the_same_outputs_and_steps() -> None:
    torch.manual_seed(0)
    made = [layers.ScaledStdConv2d(8, 8, 3), layers.ScaledStdConv2dSame(8, 8, 3, stride=2), layers.StdConv2d(8, 8, 3)]
    nn.init.uniform_(made[0].gain, 0.5, 1.5)
    given, x = around(nn.Sequential(*made)), torch.randn(2, *SHAPE)
    before = given(x)
    net = timm_nets.plain(given)
    assert net is given
    assert [type(part).__name__ for part in made] == ["Conv2d", "Conv2dSame", "Conv2d"]
    assert not any(name.endswith("gain") for name in net.state_dict())
    assert torch.allclose(net(x), before, atol=1e-6)
    check_steps(sample(net, SHAPE, 4), Case(SGD))


def adapter() -> LayerAdapter:
    return LayerAdapter(r=1, rank=3, alpha=2.0, layout="spatial")


def test_an_adapted_same_padding_layer_is_that_layer_with_another_weight() -> None:
    torch.manual_seed(0)
    plain = layers.Conv2dSame(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 7, 8)
    layer = adapt(copy.deepcopy(plain), adapter())
    assert isinstance(layer, LoraConv2d)
    nn.init.normal_(layer.lora_b)
    padded = functional.pad(x, (0, 1, 1, 1))  # 8 wide: one on the right; 7 high: one on each side
    expected = functional.conv2d(padded, plain.weight + layer.weight_delta(), plain.bias, 2)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    merged = merge(layer)
    assert type(merged) is layers.Conv2dSame
    assert torch.allclose(merged(x), expected, atol=1e-6)


def test_attaching_and_detaching_leave_every_class_and_number() -> None:
    torch.manual_seed(0)
    net = around(same_padded())
    kinds, before = [type(part) for part in net.modules()], copy.deepcopy(net.state_dict())
    x = torch.randn(2, *SHAPE)
    expected = net(x)
    report = attach(net, LoraConfig(rank=2, small_layers="adapter"))
    assert {a.layer for a in report.adapters} == {"1.0", "1.2", "2"}
    assert torch.equal(net(x), expected)
    for name, value in net.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(value, std=0.1)
    fused = fuse(net)
    assert torch.allclose(fused(x), net.eval()(x), atol=1e-6)
    assert not torch.allclose(fused(x), expected, atol=1e-3)
    detach(net)
    assert [type(part) for part in net.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def seen(net: nn.Module) -> nn.Module:
    recalibrate(net, [torch.randn(8, *SHAPE)])
    restore_policy(net)
    return net.eval()


def test_folding_keeps_the_activation() -> None:
    torch.manual_seed(0)
    net = seen(around(same_padded()))
    folded, x = fold_batchnorm(net), torch.randn(2, *SHAPE)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert torch.allclose(folded(x), net(x), atol=1e-5)


def test_a_frozen_norm_with_an_activation_uses_its_statistics_in_training_too() -> None:
    torch.manual_seed(0)
    norm = seen(around(same_padded()))[1][1]  # type: ignore[index]
    x = torch.randn(4, 12, 7, 7)
    expected = functional.silu(functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    holder = nn.Sequential(norm)
    apply_policy(holder, "frozen")
    assert torch.allclose(holder.train()(x), expected, atol=1e-6)
    restore_policy(holder)
    assert type(norm) is layers.BatchNormAct2d
    assert not torch.allclose(holder.train()(x), expected, atol=1e-3)


def test_statistics_shared_by_processes_keep_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = layers.BatchNormAct2d(4, act_layer=nn.SiLU, inplace=False)
    x = torch.randn(6, 4, 5, 5)
    expected, alone = copy.deepcopy(norm).train()(x), nn.Sequential(norm).train()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value)  # a single process
    with shared_statistics(alone):
        assert type(norm) is not layers.BatchNormAct2d
        assert torch.allclose(alone(x), expected, atol=1e-5)
    assert type(norm) is layers.BatchNormAct2d


def test_some_channels_of_a_same_padding_layer_train() -> None:
    torch.manual_seed(0)
    conv: Any = layers.Conv2dSame(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 7, 7)
    expected: Tensor = conv(x)
    layer = take_channels(conv, Partial("", "weight", "partial", (6, 4, 3, 3), 1, (1, 3)))
    assert torch.equal(layer(x), expected)
    assert type(release_channels(layer)) is layers.Conv2dSame
