"""A small network with batch normalisations to fold, and edits of its adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorac_deploy.lora import LoraConfig
from lorac_runtime.adapter import load_adapter, save_adapter

FILE = "adapter.safetensors"


def tiny(seed: int = 0) -> nn.Sequential:
    """Two Conv + BN pairs (the second grouped and with a bias), a bare 1x1 convolution, a head; BN has seen data."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, (3, 2), groups=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for layer in (net[1], net[3]):
        for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            nn.init.uniform_(value, 0.5, 2.0)
    with torch.no_grad():
        net[1].weight[2] = -1.5
    return net.eval()


SMALL = LoraConfig(rank=1)


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **metadata: str) -> None:
    """Change entries of an adapter file; a tensor None is taken out."""
    file = load_adapter(path)
    changed = {n: v for n, v in (file.tensors | (tensors or {})).items() if v is not None}
    save_adapter(path, changed, file.metadata | metadata)


class DataDependent(nn.Sequential):
    """A forward pass that torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)
