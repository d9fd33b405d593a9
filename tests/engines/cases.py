"""What `make test-engines` trains: small smooth networks, so that float32 rounding cannot flip a branch.

Together the cases run every kind of step graph: whole steps and micro-batches, adamw and sgd, frozen and batch BN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy import ArtifactConfig, LoraConfig
from lorac_exporters.artifact import write_artifact
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.manifest import InputSpec, TrainingDefaults

CLASSES = ("dark", "grey", "light", "white")
SPEC = InputSpec("input", (3, 16, 16), 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
IMAGES = 48
ADAMW = TrainingDefaults(lr=5e-3, batch_size=8, epochs=3)
SGD = TrainingDefaults("sgd", lr=0.1, batch_size=8, epochs=3, momentum=0.9, nesterov=True, label_smoothing=0.1)


class Residual(nn.Module):
    """Like a block of ResNet, with SiLU for ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, after, H / stride, W / stride)."""
        y = self.bn2(self.conv2(functional.silu(self.bn1(self.conv1(x)))))
        return functional.silu(y + self.skip(x))


class Inverted(nn.Module):
    """Like a block of MobileNetV3: expand, depthwise, squeeze-and-excite, project; a smooth gate and activation."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand, self.bn1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth, self.bn2 = nn.Conv2d(wide, wide, 5, stride, 2, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.project, self.bn3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H / stride, W / stride)."""
        y = functional.silu(self.bn1(self.expand(x)))
        y = functional.silu(self.bn2(self.depth(y)))
        y = y * torch.sigmoid(self.excite(torch.tanh(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))))
        y = self.bn3(self.project(y))
        return y + x if self.stride == 1 else y


def resnet() -> nn.Module:
    """Three residual blocks, one with stride."""
    torch.manual_seed(0)
    return _classifier(12, Residual(12, 12, 1), Residual(12, 16, 2), Residual(16, 16, 1), width=16)


def mobilenet() -> nn.Module:
    """Two inverted residual blocks, one with stride."""
    torch.manual_seed(0)
    return _classifier(8, Inverted(8, 1), Inverted(8, 2), width=8)


def _classifier(stem: int, *blocks: nn.Module, width: int) -> nn.Module:
    """A stem, blocks and a head; batch normalisations differ from their start, as in a trained network."""
    first = (nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.SiLU())
    net = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, len(CLASSES)))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net.eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, what its artifact is exported with, and options of the device's command."""

    name: str
    net: Callable[[], nn.Module]
    config: ArtifactConfig
    options: tuple[str, ...] = ()


LORA = LoraConfig(rank=2)
CASES = (
    Case("resnet", resnet, ArtifactConfig(lora=LORA, engine="onnxruntime", training=SGD)),
    Case("mobilenet", mobilenet, ArtifactConfig(lora=LORA, engine="onnxruntime", training=ADAMW)),
    Case(
        "micro-batches",
        resnet,
        ArtifactConfig(lora=LORA, engine="onnxruntime", form="branch", training=ADAMW),
        ("--micro-batch", "3"),
    ),
    Case("batch BN", resnet, ArtifactConfig(lora=LORA, engine="onnxruntime", bn_policy="batch", training=SGD)),
)


def write(case: Case, folder: Path) -> None:
    """Export the artifact of a case into ``folder``, float32 images."""
    write_artifact(
        export_graph(case.net(), SPEC.shape),
        folder,
        name=case.name,
        spec=SPEC,
        class_names=CLASSES,
        config=case.config,
    )


def write_data(path: Path) -> None:
    """Noisy images whose brightness tells the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % len(CLASSES)
    noise = rng.normal(50, 40, (IMAGES, 16, 16, 3)) + 50 * labels[:, None, None, None]
    np.savez(path, images=np.clip(noise, 0, 255).astype(np.uint8), labels=labels)
