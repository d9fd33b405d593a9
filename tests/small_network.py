"""A small network for tests of adapters, and what is done with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.lora import LoraConfig

SMALL = LoraConfig(rank=1)  # for `tiny`, where adapters of a higher rank would not be smaller than the weights


def tiny(seed: int = 0) -> nn.Sequential:
    """Stem, BN, a plain, a depthwise and a 1x1 convolution, head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def images(n: int = 4, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def step(net: nn.Module, *, lr: float = 0.1) -> None:
    """One SGD step on everything that trains."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    functional.cross_entropy(net(images()), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_state(net: nn.Module, expected: dict[str, Tensor]) -> None:
    state = net.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
