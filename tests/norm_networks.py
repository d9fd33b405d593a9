"""A small network with batch normalisation in every place, and training artifacts of it."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir as ir
import torch
from shared_export import export_graph
from torch import nn

from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime import manifest as mf
from lorac_runtime.manifest import BnPolicy, InputSpec, TrainingDefaults

SPEC = InputSpec("input", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """Smooth; BN behind convolutions with and without bias, one alone (pre-activation), one behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6, eps=1e-3, momentum=0.2)
        self.bn3, self.conv3 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, stride=2)
        self.conv4 = nn.Conv2d(8, 8, 1, bias=False)
        self.fc1, self.bn4 = nn.Linear(8, 7), nn.BatchNorm1d(7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) -> (N, 4)."""
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x))) + x
        x = torch.tanh(self.conv4(torch.tanh(self.conv3(torch.tanh(self.bn3(x))))))
        x = torch.tanh(self.bn4(self.fc1(x.mean((2, 3)))))
        result: torch.Tensor = self.fc(x)
        return result


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        nn.init.uniform_(norm.weight, 0.3, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.3, 1.5)
    with torch.no_grad():
        net.bn1.weight[2] = 0.0  # cannot be divided by
        net.bn2.weight[1] = -1e-7
        net.bn2.weight[3] *= -1
        net.bn3.weight[0] = 0.0
        net.fc.weight *= 3
    return net.eval()


@functools.cache
def graph() -> ir.Model:
    return export_graph(network(), SPEC.shape)


def export(
    folder: Path,
    method: str,
    policy: BnPolicy | None = None,
    *,
    kind: EngineChoice = "onnxruntime",
    blocks: tuple[str, ...] = (),
    adapter: Path | None = None,
) -> mf.Manifest:
    """The artifact of `network` for a method; its steps are plain SGD."""
    training = TrainingDefaults(optimizer="sgd", clip_norm=0.0, loss=METHODS[method].loss_of())
    config = ArtifactConfig(
        lora=LoraConfig(blocks=blocks),
        method=method,
        bn_policy=policy,
        engine=kind,
        training=training,
    )
    write_artifact(graph(), folder, name="net", spec=SPEC, class_names=tuple("abcd"), config=config, adapter=adapter)
    return mf.load(folder)
