"""The thin ResNets that He et al. (arXiv 1512.03385, section 4.2) made for 32 x 32 images: 6n + 2 layers.

Shortcuts are their option A: every second pixel, and zeros for the channels that are new. They hold no parameters,
so a network of 20 layers has 0.27 million. Names follow the widely used CIFAR-10 checkpoints: ``conv1``, ``bn1``,
``layer1`` to ``layer3``, ``linear``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut; (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = c_out - c_in
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = functional.pad(x, (0, 0, 0, 0, self.new_channels // 2, self.new_channels - self.new_channels // 2))
        return x


class CifarResNet(nn.Module):
    """A stem, three stages of ``blocks`` blocks, global average pooling and the head ``linear``.

    >>> import torch
    >>> CifarResNet(3, 10)(torch.zeros(2, 3, 32, 32)).shape          # 3 blocks a stage: ResNet-20
    torch.Size([2, 10])
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks)
        self.linear = nn.Linear(WIDTHS[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(c_in: int, c_out: int, blocks: int) -> nn.Sequential:
    first = CifarBlock(c_in, c_out, 1 if c_in == c_out else 2)
    return nn.Sequential(first, *(CifarBlock(c_out, c_out, 1) for _ in range(blocks - 1)))
