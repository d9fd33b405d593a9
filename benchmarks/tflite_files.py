"""The .tflite files that are measured: ours before and after fusing, and those of other converters.

litert-torch is given the network as torch.export saves it, onnx2tf as torch.onnx exports it: onnx2tf 1.29.24 reads the
layout of base.onnx wrongly and stops.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.interpreters import ROOT
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.plan import LoraConfig
from lorac_exporters.tflite import TfliteConfig, export
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER, BASE_TFLITE, InputSpec
from lorac_runtime.patch import fuse

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with random weights, and the images it takes: (channels, height, width)."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int]

    @property
    def spec(self) -> InputSpec:
        """Inputs arrive normalised."""
        return InputSpec("input", self.shape, 1 / 255, (0.5,) * 3, (0.25,) * 3)


def network(name: str, size: int) -> Network:
    """A network of `lorac_deploy.models` for ``size`` pixels; 32 gives a ResNet the stem for CIFAR."""
    torch.manual_seed(0)
    stem = size == 32 and name.startswith("resnet")
    return Network(name, build(ModelSpec(name, CLASSES, cifar_stem=stem), seed=0).eval(), (3, size, size))


def our_files(net: Network, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """base.tflite and fused.tflite (every adapter moved), and the seconds of making them."""
    canonical = canonicalize(export_graph(net.module, net.shape))
    seconds = {"convert": _convert_seconds(net, canonical, folder / "again.tflite")}
    artifact = folder / "artifact"
    names = tuple(map(str, range(CLASSES)))
    config = ArtifactConfig(lora=LoraConfig(rank=4))
    write_artifact(canonical.model, artifact, name=net.name, spec=net.spec, class_names=names, config=config)
    rng = np.random.default_rng(0)
    state = load_adapter(artifact / ADAPTER).tensors
    moved = {k: v + 0.02 * rng.standard_normal(v.shape).astype(np.float32) for k, v in state.items()}
    report = fuse(artifact, folder / "fused.tflite", moved, base=BASE_TFLITE)
    seconds |= {"fuse compute": report.compute_seconds, "fuse": report.seconds}
    return {"base": artifact / BASE_TFLITE, "fused": folder / "fused.tflite"}, seconds


def _convert_seconds(net: Network, canonical: Canonical, target: Path) -> float:
    """Least of three: from the graph in memory to the file on disk."""
    found = []
    names = tuple(map(str, range(CLASSES)))
    for _ in range(3):
        started = time.perf_counter()
        export(canonical.model, target, TfliteConfig(), spec=net.spec, class_names=names, name=net.name)
        found.append(time.perf_counter() - started)
    return min(found)


def other_file(net: Network, converter: str, interpreter: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of another converter, and what its worker says of the conversion.

    Raises RuntimeError with the converter's last words if it fails.
    """
    source, target = _source(net, converter, folder), folder / f"{converter}.tflite"
    done = subprocess.run(
        [str(interpreter), "-m", "benchmarks.tflite_convert", converter, str(source), str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{converter}: {' '.join(done.stderr.split()[-60:])}")
    said: dict[str, Any] = json.loads(done.stdout)
    return target, said


def _source(net: Network, converter: str, folder: Path) -> Path:
    example = (torch.zeros(1, *net.shape),)
    if converter == "litert-torch":
        path = folder / "network.pt2"
        torch.export.save(torch.export.export(net.module, example), path)
        return path
    path = folder / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told to be the legacy exporter, which warns that it is
        torch.onnx.export(
            net.module, example, path, dynamo=False, opset_version=17, input_names=["input"], output_names=["output"]
        )
    return path
