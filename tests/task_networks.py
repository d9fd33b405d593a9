"""Small networks that are no classifiers, their artifacts, and PyTorch as the oracle of their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from shared_export import export_graph
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.task_config import TaskConfig
from lorac_runtime.adapter import load_adapter
from lorac_runtime.delta import delta
from lorac_runtime.manifest import ADAPTER, InputSpec, Manifest, TrainingDefaults

SPEC = InputSpec("input", (3, 12, 12), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CLASSES = 3
Loss = Callable[..., Tensor]  # outputs, then targets by name
Arrays = dict[str, np.ndarray]


class UNet(nn.Module):
    """Down, up by bilinear resizing and by a transposed convolution, with two skip connections; smooth."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.mix = nn.Conv2d(20, 8, 3, padding=1)
        self.head = nn.Conv2d(16, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.tanh(self.stem(x))
        two = torch.tanh(self.down(one))
        three = torch.tanh(self.deep(two))
        four = torch.tanh(self.mix(torch.cat([self.up(three), two], 1)))
        large = functional.interpolate(four, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(torch.cat([large, one], 1))


class Detector(nn.Module):
    """Two outputs on a grid of cells: the score of an object in each, and its box."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.neck = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.score = nn.Conv2d(12, 1, 1)
        self.box = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.neck(torch.tanh(self.body(torch.tanh(self.stem(x))))))
        return self.score(x), self.box(x)


def unet(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return UNet(outputs).eval()


def export(
    out: Path, net: nn.Module, task: TaskConfig, training: TrainingDefaults, *, classes: int = 0, **fields: object
) -> Manifest:
    """The manifest of an artifact of ``net`` in ``out``."""
    config = dataclasses.replace(ArtifactConfig(lora=LoraConfig(rank=2), task=task, training=training), **fields)  # type: ignore[arg-type]
    names = tuple(f"class {number}" for number in range(classes))
    return write_artifact(
        export_graph(net, SPEC.shape), out, name="net", spec=SPEC, class_names=names, config=config
    ).manifest


def in_pytorch(
    folder: Path, manifest: Manifest, net: nn.Module, loss: Loss, batches: list[tuple[np.ndarray, Arrays]], lr: float
) -> tuple[list[float], Arrays]:
    """Losses and trained tensors after steps of plain SGD in float64, adapters added by `lorac_runtime.delta`."""
    start = load_adapter(folder / ADAPTER).tensors
    tensors = {n: torch.from_numpy(np.array(v)).double() for n, v in start.items()}
    trained = {t.name: tensors[t.name].requires_grad_() for t in manifest.trainables}
    weights = {n: v.detach().double() for n, v in net.state_dict().items()}
    losses = []
    for images, targets in batches:
        given = {n: torch.from_numpy(v) for n, v in targets.items()}
        value = loss(
            functional_call(net.double(), _fused(manifest, weights, tensors), torch.from_numpy(images).double()),
            **given,
        )
        gradients = torch.autograd.grad(value, list(trained.values()))
        with torch.no_grad():
            for tensor, gradient in zip(trained.values(), gradients, strict=True):
                tensor -= lr * gradient
        losses.append(value.item())
    return losses, {n: v.detach().numpy() for n, v in trained.items()}


def _fused(manifest: Manifest, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(weights) | {n: v for n, v in tensors.items() if n in weights}
    for a in manifest.adapters:
        change = delta(tensors[a.lora_a], tensors[a.lora_b], a.weight_shape, scale=a.alpha / a.r, layout=a.arrangement)
        found[a.weight] = weights[a.weight] + change
    return found
