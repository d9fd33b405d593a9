"""Networks that are measured, by name and size: random weights, batch normalisations that keep activations alive."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from benchmarks.resnet8 import ResNet8
from benchmarks.step_cases import calibrate
from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_runtime.manifest import InputSpec

CLASSES = 10
CLASS_NAMES = tuple(str(i) for i in range(CLASSES))
RESNET8 = "resnet8"
LEAST_PIXELS = 8


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with random weights, and the images it takes: (channels, height, width)."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int]

    @property
    def spec(self) -> InputSpec:
        """Inputs arrive normalised."""
        return InputSpec("input", self.shape, 1 / 255, (0.5,) * 3, (0.25,) * 3)

    @property
    def size(self) -> int:
        """Height and width of images."""
        return self.shape[1]


def parsed(text: str) -> tuple[str, int]:
    """(name, height and width of images). Raises ValueError for another text.

    >>> parsed("resnet18:128")
    ('resnet18', 128)
    """
    name, _, size = text.partition(":")
    if not size.isdecimal() or int(size) < LEAST_PIXELS:
        raise ValueError(f"{text}: expected NAME:PIXELS such as resnet18:128, with {LEAST_PIXELS} pixels or more")
    known = [RESNET8, *(name for name, architecture in MODELS.items() if architecture.axes == 3)]
    if name not in known:
        raise ValueError(f"{text}: no model {name}: choose from {', '.join(known)}")
    return name, int(size)


def network(text: str) -> Network:
    """The network of NAME:PIXELS; 32 pixels give a ResNet the stem for CIFAR. Raises ValueError for another text.

    >>> network("resnet8:32").shape
    (3, 32, 32)
    """
    name, size = parsed(text)
    torch.manual_seed(0)
    if name == RESNET8:
        module: nn.Module = ResNet8(CLASSES)
    else:
        stem = size == 32 and name.startswith("resnet") and MODELS[name].small_stem is not None
        module = build(ModelSpec(name, CLASSES, cifar_stem=stem), seed=0)
    net = Network(name, module, (3, size, size))
    calibrate(net.module, net.shape)
    return net
