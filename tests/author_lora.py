"""LoRA layers as loralib and the LoRA-C authors write them: factors beside a wrapped layer, merged by eval().

Written anew from the published description: A (r * k, c_in * k), B (c_out * k, r * k), reshaped as they lie in memory.
"""

from __future__ import annotations

import torch
from torch import nn


class WrappedConv(nn.Module):
    """A convolution in ``conv`` with factors; ``eval()`` merges them into its weight, ``train()`` takes them out."""

    def __init__(self, conv: nn.Conv2d, r: int, alpha: float, *, wrap: bool = True) -> None:
        super().__init__()
        k = conv.kernel_size[0]
        self.conv = conv
        self.scaling, self.merged = alpha / r, False
        self.lora_A = nn.Parameter(torch.randn(r * k, conv.in_channels * k) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(conv.out_channels // conv.groups * k, r * k) * 0.1)

    def change(self) -> torch.Tensor:
        return (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling

    def train(self, mode: bool = True) -> WrappedConv:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.conv.weight += -self.change() if mode else self.change()
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight if self.merged else self.conv.weight + self.change()
        return self.conv._conv_forward(x, weight, self.conv.bias)


class WrappedLinear(nn.Linear):
    """loralib's fully connected layer: its factors are its own parameters."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


def wrapped(net: nn.Module, names: tuple[str, ...], *, r: int, alpha: float, seed: int = 0) -> nn.Module:
    """The network with these convolutions replaced, in place."""
    torch.manual_seed(seed)
    for name in names:
        home, _, leaf = name.rpartition(".")
        parent = net.get_submodule(home)
        layer = getattr(parent, leaf)
        made = WrappedLinear(layer, r, alpha) if isinstance(layer, nn.Linear) else WrappedConv(layer, r, alpha)
        setattr(parent, leaf, made)
    return net
