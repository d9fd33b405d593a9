"""The small network of `norm_networks` about to train by a method, and batches for it."""

from __future__ import annotations

import numpy as np
import torch
from norm_networks import Net, network

from lorac_deploy.lora import select_trainable
from lorac_exporters.plan import LoraConfig
from lorac_runtime.manifest import BnPolicy

STEPS = 3


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """The last one is smaller."""
    rng = np.random.default_rng(1)
    sizes = [6] * (STEPS - 1) + [4]
    return [(rng.standard_normal((n, 3, 8, 8)).astype(np.float32), rng.integers(0, 4, n)) for n in sizes]


def prepared(method: str, policy: BnPolicy | None = None, *, blocks: tuple[str, ...] = (), moved: float = 0.1) -> Net:
    """The PyTorch side, trainable tensors ``moved`` away from their start."""
    net = network()
    select_trainable(net, method, LoraConfig(blocks=blocks), bn_policy=policy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    return net
