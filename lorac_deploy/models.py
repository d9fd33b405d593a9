"""Networks by name, with the number of classes, input channels and kind of stem that a task needs.

>>> net = build(ModelSpec("resnet18", classes=10, cifar_stem=True))
>>> net.conv1.kernel_size, net.conv1.stride, type(net.maxpool).__name__, net.fc.out_features
((3, 3), (1, 1), 'Identity', 10)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorac_deploy import _torchvision, timm_nets
from lorac_deploy.cifar_resnets import CifarResNet
from lorac_deploy.segmentation_nets import SEGMENTATION_NETS, segmentation_net
from lorac_deploy.signal_nets import Cnn1d, Mlp
from lorac_deploy.structure import describe, find_head
from lorac_deploy.weights import LoadReport, load_imagenet, load_weights
from lorac_runtime.tasks import CLASSIFICATION, REGRESSION, SEGMENTATION

__all__ = [
    "MODELS",
    "Architecture",
    "LoadReport",
    "ModelSpec",
    "architecture",
    "build",
    "load_imagenet",
    "load_weights",
    "replace_head",
    "require_axes",
]


AXES = {1: "(features,)", 2: "(channels, length)", 3: "(channels, height, width)"}


@dataclass(frozen=True)
class ModelSpec:
    """All it takes to build a network again.

    ``name`` is one of `MODELS`, or ``timm/NAME``. ``cifar_stem`` swaps the stem for one that keeps the resolution of
    small images: stride 1, no max-pooling. ``channels`` is the number of input channels, or of features. ``task`` is
    what it is trained for; ``classes`` counts the numbers that it gives where that is regression.

    Raises ValueError for a name, a count or a combination that does not exist.
    """

    name: str
    classes: int
    cifar_stem: bool = False
    channels: int = 3
    task: str = CLASSIFICATION

    def __post_init__(self) -> None:
        known = architecture(self.name)
        if self.classes < 1 or self.channels < 1:
            raise ValueError(
                f"{self.name} needs at least one class and one input channel, got {self.classes} and {self.channels}"
            )
        if self.cifar_stem and known.small_stem is None:
            able = ", ".join(name for name, architecture in MODELS.items() if architecture.small_stem)
            raise ValueError(
                f"{self.name} has no CIFAR stem to swap in ({known.why_no_small_stem}); "
                f"leave the option away, or choose one of {able}"
            )
        if self.task not in (CLASSIFICATION, SEGMENTATION, REGRESSION):
            raise ValueError(f"task {self.task!r} is not one of {CLASSIFICATION}, {SEGMENTATION}, {REGRESSION}")
        if known.dense != (self.task == SEGMENTATION):
            able = ", ".join(name for name, found in MODELS.items() if found.dense == (self.task == SEGMENTATION))
            raise ValueError(f"{self.name} is no network for {self.task}; choose one of {able}")


@dataclass(frozen=True)
class Architecture:
    """How a network is made, and how its stem is swapped in place.

    ``axes`` of a sample: 3 of an image, (channels, height, width), where ``make`` takes the number of classes and gives
    a network of 3 channels; 2 or 1 of a signal, (channels, length) or (features,), where it takes the number of
    channels or features too, first, as it does with ``any_channels``. ``dense``: it gives scores for each pixel,
    (N, classes, H, W).
    """

    make: Callable[..., nn.Module]
    small_stem: Callable[[Any], None] | None = None
    why_no_small_stem: str = "its stem is not a single convolution with pooling that could be replaced"
    axes: int = 3
    any_channels: bool = False
    dense: bool = False


def architecture(name: str) -> Architecture:
    """The network called ``name``: one of `MODELS`, or of timm's as ``timm/NAME``.

    Raises ValueError for a name that does not exist, or one of timm's where timm is not installed.
    """
    if timm_nets.is_timm(name):
        timm_nets.require_known(name)
        return Architecture(
            functools.partial(timm_nets.make, name), why_no_small_stem="timm's networks keep theirs", any_channels=True
        )
    if name not in MODELS:
        raise ValueError(
            f"model {name!r} is not known; choose one of {', '.join(MODELS)}, or one of timm's: {timm_nets.PREFIX}NAME"
        )
    return MODELS[name]


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """A freshly initialised network that gives (N, classes) logits for (N, channels, H, W) images, or for signals.

    One for segmentation gives (N, classes, H, W).

    The same spec and seed give the same numbers; the global random state is not touched.
    """
    known = architecture(spec.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if known.axes < 3 or known.any_channels:
            return known.make(spec.channels, spec.classes)
        module = known.make(spec.classes)
        if spec.cifar_stem and known.small_stem:
            known.small_stem(module)
        if spec.channels != 3:
            stem = describe(module).convs[0].name
            _swap_conv(module, stem, channels=spec.channels)
    return module


def require_axes(name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the network called ``name`` does not take samples of this shape.

    >>> require_axes("mlp", (3, 128))
    Traceback (most recent call last):
    ...
    ValueError: mlp takes samples of shape (features,), got (3, 128); for these there is cnn1d
    """
    axes = architecture(name).axes
    if axes != len(shape):
        able = ", ".join(n for n, other in MODELS.items() if other.axes == len(shape))
        wanted = AXES[axes]
        raise ValueError(f"{name} takes samples of shape {wanted}, got {shape}; for these there is {able}")


def replace_head(module: nn.Module, classes: int, *, seed: int = 0, head: str | None = None) -> str:
    """Give ``module``, in place, a fresh head of ``classes`` outputs; returns the head's name.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    >>> replace_head(net, 4), net[2].out_features
    ('2', 4)

    Raises ValueError if there is no head, or ``classes`` is below 1.
    """
    if classes < 1:
        raise ValueError(f"a head needs at least one class, got {classes}")
    name = find_head(module, head)
    old: Any = module.get_submodule(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, classes, bias=old.bias is not None)
        else:
            new = type(old)(old.in_channels, classes, 1, bias=old.bias is not None)
    module.set_submodule(name, new.to(old.weight).train(old.training))
    return name


def _swap_conv(module: nn.Module, name: str, *, channels: int | None = None, kernel: int | None = None) -> None:
    """Replace a convolution by a fresh one with other input channels, or a stride-1 one of ``kernel`` size."""
    old: Any = module.get_submodule(name)
    new = nn.Conv2d(
        channels or old.in_channels,
        old.out_channels,
        kernel or old.kernel_size,
        stride=1 if kernel else old.stride,
        padding=kernel // 2 if kernel else old.padding,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(name, new)


def _resnet_stem(net: Any) -> None:
    _swap_conv(net, "conv1", kernel=3)
    net.maxpool = nn.Identity()


def _densenet_stem(net: Any) -> None:
    _swap_conv(net, "features.conv0", kernel=3)
    net.features.pool0 = nn.Identity()


def _mobilenet_stem(net: Any) -> None:
    net.features[0][0].stride = (1, 1)  # already 3x3, without pooling


def _from_torchvision(name: str, classes: int) -> nn.Module:
    net: nn.Module = _torchvision.models.get_model(name, weights=None, num_classes=classes)
    return net


_STEMS: dict[tuple[str, ...], Callable[[Any], None] | None] = {
    ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"): _resnet_stem,
    ("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"): _resnet_stem,
    ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"): _mobilenet_stem,
    ("densenet121", "densenet169", "densenet201"): _densenet_stem,
    ("squeezenet1_0", "squeezenet1_1"): None,
}
_DENSE = "it gives scores for each pixel"
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)

MODELS: dict[str, Architecture] = (
    {
        name: Architecture(functools.partial(_from_torchvision, name), stem)
        for names, stem in _STEMS.items()
        for name in names
    }
    | {
        f"resnet{depth}": Architecture(
            functools.partial(CifarResNet, (depth - 2) // 6), why_no_small_stem="it was made for CIFAR and has one"
        )
        for depth in _CIFAR_DEPTHS
    }
    | {
        name: Architecture(functools.partial(segmentation_net, name), why_no_small_stem=_DENSE, dense=True)
        for name in SEGMENTATION_NETS
    }
    | {
        "mlp": Architecture(Mlp, why_no_small_stem="it takes no images", axes=1),
        "cnn1d": Architecture(Cnn1d, why_no_small_stem="it takes no images", axes=2),
    }
)
