"""The image classifier of MLPerf Tiny: a ResNet of eight layers for 32 x 32 images (Banbury et al. 2021).

Strided convolutions are padded as PyTorch does it, so weights of TensorFlow would not give its answers; for latency
only the shapes count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Stack(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet8(nn.Module):
    """Three stacks of 16, 32 and 64 channels.

    >>> sum(p.numel() for p in ResNet8(10).parameters())
    78186
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.stack1, self.stack2, self.stack3 = Stack(16, 16, 1), Stack(16, 32, 2), Stack(32, 64, 2)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, classes)."""
        y = self.stack3(self.stack2(self.stack1(functional.relu(self.bn1(self.conv1(x))))))
        pooled: Tensor = torch.flatten(functional.adaptive_avg_pool2d(y, 1), 1)
        logits: Tensor = self.fc(pooled)
        return logits
