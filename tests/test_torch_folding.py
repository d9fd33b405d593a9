"""Folding of batch normalisation in PyTorch networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import trained
from torch import Tensor, nn

from lorac_deploy.batchnorm import apply_policy
from lorac_deploy.folding import conv_bn_pairs, fold_batchnorm
from lorac_deploy.lora import LoraConfig, attach
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.errors import ConversionError


def seen(module: nn.Module) -> nn.Module:
    """The network with BN tensors unlike the start, in evaluation mode."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value in (*part.parameters(), part.running_mean, part.running_var):
                nn.init.uniform_(value, 0.5, 2.0)
    return module.eval()


class Branches(nn.Module):
    """``reused`` runs twice, ``read`` is also read past its BN, ``b`` alone can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.reused = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.read, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm_a, self.norm_reused, self.norm_read, self.norm_b = (nn.BatchNorm2d(4) for _ in range(4))
        self.skipped = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.norm_a(self.reused(self.norm_reused(self.reused(x)))).relu()
        y = self.read(x)
        return self.norm_b(self.skipped(self.b(self.norm_read(y) + y)))


def test_only_a_convolution_that_its_bn_alone_reads_once_is_paired() -> None:
    assert conv_bn_pairs(Branches()) == {"norm_b": "b"}


def test_a_shared_weight_and_a_transposed_convolution_are_not_paired() -> None:
    convs = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)]
    convs[1].weight = convs[0].weight
    net = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(4))))
    assert conv_bn_pairs(net) == {}


def test_a_bn_that_is_used_twice_is_not_paired() -> None:
    norm = nn.BatchNorm2d(4)
    assert conv_bn_pairs(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)) == {}


def test_bn_before_a_convolution_is_not_paired() -> None:
    assert conv_bn_pairs(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))) == {}


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), nn.BatchNorm2d(6, eps=0.1)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.Dropout(), nn.BatchNorm2d(6, affine=False)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
        nn.Sequential(nn.Conv2d(4, 3, 1), Branches()),
    ],
    ids=["grouped", "depthwise", "not affine", "1-D", "partly"],
)
def test_folded_networks_give_the_same_outputs_and_hold_fewer_bns(net: nn.Module) -> None:
    net, x = seen(net), torch.randn(2, 4, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold_batchnorm(net)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
    assert count(net) - count(folded) == len(conv_bn_pairs(net)) > 0
    assert conv_bn_pairs(folded) == {}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_resnet_folds_as_a_whole() -> None:
    net, x = trained("resnet18"), torch.randn(2, 3, 32, 32)
    folded = fold_batchnorm(net)
    assert count(folded) == 0
    assert (folded(x) - net(x)).abs().max().item() <= 1e-4 * max(1.0, net(x).abs().max().item())


@pytest.mark.parametrize(
    ("name", "left"), [("mobilenet_v2", 0), ("mobilenet_v3_small", 0), ("resnet50", 0), ("densenet121", 62)]
)
def test_batch_normalisations_that_no_convolution_can_absorb_are_left(name: str, left: int) -> None:
    """62 is what is known to remain of DenseNet-121, whose layers begin with BN."""
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10))
    assert count(net) - len(conv_bn_pairs(net)) == left


def count(net: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())


def test_frozen_bn_folds_alike() -> None:
    net = seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    expected = fold_batchnorm(net).state_dict()
    apply_policy(net, "frozen")
    assert all(torch.equal(value, expected[name]) for name, value in fold_batchnorm(net).state_dict().items())


def test_networks_with_adapters_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    attach(net, LoraConfig(rank=1))
    with pytest.raises(ValueError, match="fold first, then attach"):
        fold_batchnorm(net)


class DataDependent(nn.Module):
    """A forward pass that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else self.norm(self.conv(-x))


def test_where_the_forward_pass_cannot_be_followed_pairs_can_be_given() -> None:
    net: Any = seen(DataDependent())
    with pytest.raises(ConversionError, match=r"forward pass of DataDependent cannot be followed.*pairs="):
        fold_batchnorm(net)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fold_batchnorm(net, pairs={"norm": "conv"})(x), net(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="conv is a Conv2d and norm a BatchNorm2d"):
        fold_batchnorm(net, pairs={"conv": "norm"})
