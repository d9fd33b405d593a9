"""Fusing into base.tflite gives, byte for byte, the file that exporting the fused ONNX model afresh gives.

One network has every kind of layer that stores its weight in a way of its own; the other is a whole ResNet-18.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from shared_export import export_graph
from torch import nn

from lorac_deploy.models import ModelSpec, build
from lorac_exporters import tflite
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.tflite_config import Weights
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.patch import FuseReport, fuse

SPEC = mf.InputSpec("input", (3, 12, 12), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CLASSES = 5
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 12, 12, 3), dtype=np.uint8)
WEIGHTS: tuple[Weights, ...] = ("float32", "fp16", "int8")


class Branches(nn.Module):
    """A depthwise, a grouped and a dilated convolution that read the same map; their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=3, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.depthwise(x) + self.norm(self.grouped(x)) + self.dilated(x))


def network() -> nn.Sequential:
    """Stem, 1 x 1, branches, a strided convolution, a transposed one, a head behind a Flatten."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        nn.Conv2d(12, 12, 1),
        nn.ReLU6(),
        Branches(),
        nn.Conv2d(12, 20, 4, stride=3),
        nn.ReLU(),
        nn.ConvTranspose2d(20, 6, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, CLASSES),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.3)
    return net.eval()


@functools.cache
def graph(name: str) -> ir.Model:
    """The raw graph; the exporter works on copies of it."""
    net = network() if name == "layers" else build(ModelSpec(name, classes=CLASSES, cifar_stem=True))
    return export_graph(net, SPEC.shape)


def artifact(folder: Path, weights: Weights, policy: mf.BnPolicy = "frozen", name: str = "layers") -> Path:
    config = ArtifactConfig(
        lora=LoraConfig(rank=2, biases="head", small_layers="adapter"), bn_policy=policy, tflite=weights
    )
    names = tuple("abcdefghij"[:CLASSES])
    calibration = IMAGES if weights == "int8" else None
    write_artifact(
        graph(name), folder, name="net", spec=SPEC, class_names=names, config=config, calibration=calibration
    )
    return folder


def trained(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Something else in every tensor that can change."""
    rng = np.random.default_rng(seed)
    start = load_adapter(folder / mf.ADAPTER).tensors
    return {name: (value + 0.05 * rng.uniform(size=value.shape)).astype(np.float32) for name, value in start.items()}


def fused_and_fresh(folder: Path, state: dict[str, np.ndarray], weights: Weights) -> tuple[bytes, bytes, FuseReport]:
    """fused.tflite, and what exporting fused.onnx with the same ranges gives."""
    home, manifest = folder.parent, mf.load(folder)
    report = fuse(folder, home / "fused.tflite", state, base=mf.BASE_TFLITE)
    fuse(folder, home / "fused.onnx", state)
    tflite.export(
        ir.load(home / "fused.onnx"),
        home / "fresh.tflite",
        tflite.TfliteConfig(weights),
        spec=manifest.input,
        class_names=manifest.class_names,
        name=manifest.model,
        calibration=tflite.ranges_of(folder / mf.BASE_TFLITE) if weights == "int8" else None,
    )
    return (home / "fused.tflite").read_bytes(), (home / "fresh.tflite").read_bytes(), report


def differing(folder: Path, one: bytes, other: bytes) -> set[str]:
    """Tensors of the patch table whose bytes differ, for a message that says where."""
    places = np.flatnonzero(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8))
    patches = [p for p in mf.load(folder).patches if p.file == mf.BASE_TFLITE]
    named = {p.tensor for p in patches if np.any((places >= p.offset) & (places < p.content.end))}
    return named or {f"{len(places)} bytes outside of the patch table"} if len(places) else set()


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_layer_is_stored_as_a_fresh_export_stores_it(
    tmp_path: Path, weights: Weights, policy: mf.BnPolicy
) -> None:
    folder = artifact(tmp_path / "artifact", weights, policy)
    base = (folder / mf.BASE_TFLITE).read_bytes()
    for seed in (1, 2):
        fused, fresh, report = fused_and_fresh(folder, trained(folder, seed), weights)
        assert len(fused) == len(fresh) == len(base)
        assert differing(folder, fused, fresh) == set()
        assert differing(folder, fused, base) == set(report.tensors)
        assert fused == fresh
    assert (folder / mf.BASE_TFLITE).read_bytes() == base


def test_the_start_of_training_gives_the_base_back(tmp_path: Path) -> None:
    for weights in WEIGHTS:
        folder = artifact(tmp_path / weights / "artifact", weights)
        state = load_adapter(folder / mf.ADAPTER).tensors  # lora_b is zero
        fuse(folder, tmp_path / "fused.tflite", state, base=mf.BASE_TFLITE)
        assert (tmp_path / "fused.tflite").read_bytes() == (folder / mf.BASE_TFLITE).read_bytes()


@pytest.mark.parametrize("size", ["dead channel", "huge bias", "beyond half precision"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_numbers_at_the_edge_of_a_form_are_stored_as_a_fresh_export_stores_them(
    tmp_path: Path, weights: Weights, size: str
) -> None:
    folder = artifact(tmp_path / "artifact", weights)
    state = trained(folder, 3)
    head = next(name for name, value in state.items() if value.shape == (CLASSES, 216))
    bias = next(name for name, value in state.items() if value.shape == (CLASSES,))
    if size == "dead channel":
        state[head][1], state["0.weight"][2] = 0, 0
    elif size == "huge bias":
        state[bias][0] = 3e9
    else:
        state[head][0, :3] = [65519, -65520, 1e9]
    fused, fresh, report = fused_and_fresh(folder, state, weights)
    assert differing(folder, fused, fresh) == set()
    assert fused == fresh
    assert report.overflowed == (2 if (weights, size) == ("fp16", "beyond half precision") else 0)
    assert report.saturated == ()


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_resnet18_is_fused_as_exported(tmp_path: Path, weights: Weights) -> None:
    folder = artifact(tmp_path / "artifact", weights, "batch", "resnet18")
    fused, fresh, report = fused_and_fresh(folder, trained(folder, 1), weights)
    assert fused == fresh
    assert len(report.tensors) == 2 * 21
