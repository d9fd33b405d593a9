"""Artifacts of a small network with a base.tflite, and what a device makes of them."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from shared_export import export_graph
from torch import nn

from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.references import random_raw
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.manifest import InputSpec
from lorac_runtime.patch import fuse

SPEC = InputSpec("input", (3, 10, 10), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("a", "b", "c", "d")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(NAMES)))
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    for part in (net[0], net[3], net[7]):
        nn.init.normal_(part.weight, std=0.2)
    return net.eval()


@functools.cache
def exported() -> ir.Model:
    """The network's raw graph; the exporter works on copies of it."""
    return export_graph(network(), SPEC.shape)


def artifact(folder: Path, weights: str, *, in_graph: bool = False) -> Path:
    """An artifact whose base.tflite stores ``weights``."""
    config = ArtifactConfig(lora=LoraConfig(rank=2, rank_mode="r"), tflite=weights)  # type: ignore[arg-type]
    spec = dataclasses.replace(SPEC, in_graph=in_graph)
    calibration = random_raw(spec, 32, seed=9) if weights == "int8" else None
    write_artifact(exported(), folder, name="net", spec=spec, class_names=NAMES, config=config, calibration=calibration)
    return folder


def adapted(folder: Path, out: Path, *, size: float = 0.1) -> Path:
    """What a device writes: an adapter with random changes and both fused files."""
    out.mkdir()
    start, rng = load_adapter(folder / mf.ADAPTER), np.random.default_rng(1)
    state = {
        name: (value + size * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in start.tensors.items()
    }
    save_adapter(out / mf.ADAPTER, state, start.metadata)
    fuse(folder, out / "fused.onnx", state)
    fuse(folder, out / "fused.tflite", state, base=mf.BASE_TFLITE)
    return out


def copies(artifact: Path, fused: Path, folder: Path) -> tuple[Path, Path]:
    """Both folders once more, to be damaged."""
    return Path(shutil.copytree(artifact, folder / "artifact")), Path(shutil.copytree(fused, folder / "adapted"))
