"""A network with three stages for tests of the fine-tuning benchmarks, whose artifacts are written in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.step_cases import CLASSES, Case, image_spec

SIZE = 8


def three_stages() -> nn.Sequential:
    """A stem and three convolutions, the last two of which halve the image."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for stride in (1, 2, 2):
        layers += [nn.Conv2d(16, 16, 3, stride=stride, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)).eval()


def small_case(folder: Path) -> Case:
    """That network on images of 8 x 8."""
    return Case("three stages", folder / "case", spec=image_spec(SIZE), module=three_stages())
