"""The networks of the field, with numbers that have seen data, for comparing TFLite files with PyTorch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import trained
from step_networks import UNet
from tflite_agreement import compared, lowered
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy._torchvision import models
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.torch_graph import export_graph

CLASSES = 10
LARGEST_LOGIT = 5.0


@dataclasses.dataclass(frozen=True)
class Tried:
    """A network, the shape of an image, and what its TFLite file should look like: operators, TRANSPOSE among them."""

    make: Callable[[], nn.Module]
    size: int
    operators: int
    transposes: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, num_classes=CLASSES, **options)


def cifar_resnet() -> nn.Module:
    return trained("resnet18", cifar_stem=True)


def touched(make: Callable[[], nn.Module], shape: tuple[int, int, int]) -> nn.Module:
    """In eval mode, all numbers of its norms away from their start, logits of a size of about 5."""
    torch.manual_seed(0)
    net = make()
    _touch_norms(net)
    _settle(net, images(16, shape, seed=1))
    _scale_head(net.eval(), images(8, shape, seed=2))
    return net


def images(count: int, shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Coloured patches and noise: pictures that differ in more than noise, (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(count, shape[0], 4, 4, generator=generator)
    noise = torch.randn(count, *shape, generator=generator)
    return functional.interpolate(patches, shape[1:], mode="bilinear") + 0.3 * noise


def _touch_norms(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.4, 1.2)
            nn.init.normal_(module.bias, mean=0.7, std=0.2)
        scale = getattr(module, "layer_scale", None)  # ConvNeXt's blocks begin as nothing
        if isinstance(scale, nn.Parameter):
            nn.init.uniform_(scale, 0.2, 0.8)


def _settle(net: nn.Module, batch: Tensor) -> None:
    """Running statistics of a batch, and then a little off."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(batch)
    for norm in norms:
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))


def _scale_head(net: nn.Module, batch: Tensor) -> None:
    heads = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        factor = LARGEST_LOGIT / net(batch).abs().max()
        for parameter in heads[-1].parameters():
            parameter.mul_(factor)


def unet(up: str) -> Callable[[], nn.Module]:
    return lambda: UNet(up, nn.ReLU, nn.MaxPool2d)


# Built of nothing that the others are not built of.
LARGER = ("resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large", "regnet_y_400mf", "densenet121")
NETWORKS = {
    "resnet18 with CIFAR stem": Tried(cifar_resnet, 32, 33),
    "resnet18": Tried(torchvision("resnet18"), 64, 36),
    "resnet34": Tried(torchvision("resnet34"), 64, 60),
    "resnet50": Tried(torchvision("resnet50"), 64, 77),
    "resnet101": Tried(torchvision("resnet101"), 64, 145),
    "mobilenet_v2": Tried(torchvision("mobilenet_v2"), 64, 69),
    "mobilenet_v3_small": Tried(torchvision("mobilenet_v3_small"), 64, 121),
    "mobilenet_v3_large": Tried(torchvision("mobilenet_v3_large"), 64, 133),
    "efficientnet_b0": Tried(torchvision("efficientnet_b0"), 64, 243),
    "densenet121": Tried(torchvision("densenet121"), 64, 310),
    "googlenet": Tried(torchvision("googlenet", aux_logits=False, init_weights=False), 80, 82),
    "squeezenet1_1": Tried(torchvision("squeezenet1_1"), 64, 38),
    "shufflenet_v2_x1_0": Tried(torchvision("shufflenet_v2_x1_0"), 64, 144, transposes=16),
    "regnet_x_400mf": Tried(torchvision("regnet_x_400mf"), 64, 100),
    "regnet_y_400mf": Tried(torchvision("regnet_y_400mf"), 64, 156),
    "convnext_tiny": Tried(torchvision("convnext_tiny"), 64, 322),
    "unet, transposed": Tried(unet("transposed"), 16, 16),
    "unet, bilinear": Tried(unet("bilinear"), 16, 14),
}


def cases(first: int) -> list[Any]:
    """Parameters of every second network."""
    return [pytest.param(n, marks=pytest.mark.long if n in LARGER else ()) for n in list(NETWORKS)[first::2]]


def check(name: str) -> None:
    """Both runtimes give PyTorch's logits for two images and for one, and the file has the operators expected."""
    tried = NETWORKS[name]
    net = touched(tried.make, tried.shape)
    batch = images(2, tried.shape)
    with torch.no_grad():
        expected = net(batch).numpy()
    largest = abs(expected).max()
    assert 1 < largest < 20
    assert abs(expected[0] - expected[1]).max() > 0.05 * largest, "the logits hardly depend on the image"
    network = lowered(export_graph(net, tried.shape))
    found = compared(to_bytes(network), batch.numpy(), [expected])
    assert not found.wrong, f"{found.errors} {found.said}"
    kinds = Counter(operator.kind for operator in network.operators)
    assert (kinds.total(), kinds["TRANSPOSE"]) == (tried.operators, tried.transposes), kinds
