"""Networks that give scores of classes for each pixel: torchvision's by name, and a small U-Net.

>>> net = segmentation_net("unet_small", 3)
>>> net(torch.zeros(1, 3, 32, 32)).shape
torch.Size([1, 3, 32, 32])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy import _torchvision

SEGMENTATION_NETS = (
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "unet_small",
)
_LRASPP_HEADS = ("classifier.low_classifier", "classifier.high_classifier")  # their sum is the answer


def segmentation_net(name: str, classes: int) -> nn.Module:
    """A freshly initialised network of `SEGMENTATION_NETS`: (N, 3, H, W) -> (N, classes, H, W)."""
    return UNet(classes) if name == "unet_small" else Scores(name, classes)


class Scores(nn.Module):
    """A segmentation network of torchvision with its own names of tensors; it answers with the scores alone.

    torchvision's answers are dictionaries. ``heads`` names the layers that give the scores where they are several
    (`lorac_deploy.structure`).
    """

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        options = {"weights": None, "weights_backbone": None, "num_classes": classes}
        net = _torchvision.models.get_model(name, **options)
        self.backbone, self.classifier = net.backbone, net.classifier
        self._levels = name.startswith("lraspp")  # its classifier reads two feature maps
        self.heads = _LRASPP_HEADS if self._levels else ()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes, H, W)."""
        features = self.backbone(images)
        scores = self.classifier(features if self._levels else features["out"])
        return functional.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """Three scales (Ronneberger et al., arXiv 1505.04597), ``width`` channels at the first; sides a multiple of 4."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.enter = _block(3, width)
        self.down1 = _block(width, 2 * width, stride=2)
        self.down2 = _block(2 * width, 4 * width, stride=2)
        self.up1 = _block(6 * width, 2 * width)
        self.up2 = _block(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes, H, W)."""
        one = self.enter(images)
        two = self.down1(one)
        three = self.down2(two)
        four = self.up1(torch.cat([_twice(three), two], 1))
        scores: Tensor = self.head(self.up2(torch.cat([_twice(four), one], 1)))
        return scores


def _block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source, step in ((channels, stride), (width, 1)):
        layers += [nn.Conv2d(source, width, 3, step, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def _twice(maps: Tensor) -> Tensor:
    return functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
