"""Small networks for signals: fully connected ones for spectra and other features, convolutional ones along time."""

from __future__ import annotations

from torch import Tensor, nn

HIDDEN = 96
WIDTHS = (16, 32, 64)


class Mlp(nn.Module):
    """Fully connected: features - 96 - 96 - classes, with ReLU: the fan network of Skip2-LoRA (arXiv 2410.21073).

    Takes (N, features), gives (N, classes) logits.

    >>> [tuple(weight.shape) for weight in Mlp(256, 3).parameters() if weight.ndim == 2]
    [(96, 256), (96, 96), (3, 96)]
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) -> (N, classes)."""
        x = self.relu(self.fc1(x))
        return self.fc3(self.relu(self.fc2(x)))  # type: ignore[no-any-return]


class Cnn1d(nn.Module):
    """Three convolutions along time, each with BN and ReLU and half the length; mean over time; a linear head.

    Takes (N, channels, length) of any length, gives (N, classes) logits.

    >>> import torch
    >>> Cnn1d(3, 4).eval()(torch.zeros(2, 3, 50)).shape
    torch.Size([2, 4])
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _halving(channels, WIDTHS[0], 7)
        self.conv2, self.bn2 = _halving(WIDTHS[0], WIDTHS[1], 5)
        self.conv3, self.bn3 = _halving(WIDTHS[1], WIDTHS[2], 3)
        self.fc = nn.Linear(WIDTHS[2], classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, length) -> (N, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(2))  # type: ignore[no-any-return]


def _halving(c_in: int, c_out: int, kernel: int) -> tuple[nn.Conv1d, nn.BatchNorm1d]:
    return nn.Conv1d(c_in, c_out, kernel, stride=2, padding=kernel // 2, bias=False), nn.BatchNorm1d(c_out)
