"""A small data set and networks for tests of training."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from lorac_deploy.data import Dataset, input_spec
from lorac_deploy.lora import LoraConfig
from lorac_deploy.trainer import TrainConfig, TrainReport, train
from lorac_runtime.manifest import InputSpec

NAMES = ("red", "green", "blue")


def dataset(n: int = 48, *, side: int = 8, seed: int = 0, noise: float = 0.3) -> Dataset:
    """Noisy images whose class is the brighter channel; the share ``noise`` of the labels is wrong."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 180, (n, side, side, 3))
    images[np.arange(n), :, :, labels] += 60
    wrong = rng.random(n) < noise
    labels[wrong] = rng.integers(0, 3, wrong.sum())
    return Dataset(images.astype(np.uint8), labels.astype(np.int64), NAMES)


def spec(data: Dataset) -> InputSpec:
    return input_spec(data.images)


def network(seed: int = 0) -> nn.Module:
    """Two convolutions with batch normalisation, dropout, a head of three."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False),  # BN would make its gradient pure noise
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, 3),
        )


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states hold the same bits under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DATA = dataset()
QUICK = TrainConfig(epochs=3, batch_size=10, bn_policy="batch", val_fraction=0.2)
LEARNING = dataclasses.replace(QUICK, epochs=6, lr=0.03)


def run(
    net: nn.Module, data: Dataset = DATA, *, method: str = "full", config: TrainConfig = QUICK, **more
) -> TrainReport:
    return train(net, data, input_spec=spec(data), method=method, config=config, lora=LoraConfig(rank=1), **more)
