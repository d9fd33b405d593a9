"""Trainings that one process and several must do alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from training_cases import DATA, QUICK, dataset, network, spec

from lorac_deploy.data import Dataset
from lorac_deploy.lora import LoraConfig
from lorac_deploy.train_config import TrainConfig
from lorac_deploy.trainer import train
from lorac_deploy.training_report import TrainReport

# 38 training images in batches of 10, 9, 10, 9: halves of unequal size. SGD, because AdamW makes noise of zeros.
SETTINGS = dataclasses.replace(QUICK, optimizer="sgd", lr=0.05, augment="crop-flip", clip_norm=0.5)
CASES: dict[str, tuple[str, TrainConfig]] = {
    "full": ("full", SETTINGS),
    "lora-c": ("lora-c", dataclasses.replace(SETTINGS, bn_policy="frozen")),
    "head": ("head", dataclasses.replace(SETTINGS, bn_policy="recalibrate")),
}


def plain_network() -> nn.Module:
    """Without dropout, which each process draws for itself."""
    net = network()
    net[8] = nn.Identity()
    return net


def fresh_images() -> Dataset:
    return dataset(300, seed=5)  # three batches of evaluation, shared by two processes


def train_case(net: nn.Module, name: str, *, config: TrainConfig | None = None, **more: Any) -> TrainReport:
    method, settings = CASES[name]
    lora = LoraConfig(rank=1)
    return train(net, DATA, input_spec=spec(DATA), method=method, config=config or settings, lora=lora, **more)
