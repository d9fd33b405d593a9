"""Networks for tests: torchvision models with batch normalisations that have seen data, and touched adapters."""

from __future__ import annotations

import torch
from torch import nn

from lorac_deploy.models import ModelSpec, build
from lorac_runtime.manifest import InputSpec

SPEC = InputSpec("input", (3, 32, 32), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = tuple("abcdefghij")


def trained(name: str, *, seed: int = 0, cifar_stem: bool = False) -> nn.Module:
    """A network in eval mode whose BN layers differ from their start in all four tensors."""
    torch.manual_seed(seed)
    net = build(ModelSpec(name, classes=10, cifar_stem=cifar_stem), seed=seed)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 32, 32))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))
    return net.eval()


def touch_adapters(net: nn.Module, *, seed: int = 1, size: float = 0.02) -> None:
    """Move every trainable tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
