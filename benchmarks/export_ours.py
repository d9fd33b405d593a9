"""Worker: make one of our files of a PyTorch network, and say how long that took; see `tflite_convert`.

The source is the network as torch.save writes it, with the shape of an image beside it. What is counted
begins with the network in memory and ends with the file or folder on disk.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

import lorac_deploy.models  # noqa: F401 - a network of torchvision loads only after this
from benchmarks.export_conversions import ENGINES, SHAPE
from benchmarks.networks import CLASS_NAMES, Network
from benchmarks.tflite_convert import Call, Converter, main
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.choices import EngineChoice
from lorac_exporters.graph_tools import save
from lorac_exporters.plan import LoraConfig
from lorac_exporters.tflite import TfliteConfig, export
from lorac_exporters.tflite_config import WEIGHTS, Weights
from lorac_exporters.torch_graph import export_graph

IMAGES = 16  # for calibration


def load(source: Path) -> Network:
    """The network that the parent saved."""
    module: nn.Module = torch.load(source, weights_only=False)
    channels, height, width = json.loads((source.parent / SHAPE).read_text())
    return Network("network", module.eval(), (channels, height, width))


def _graph(net: Network, call: Call) -> ir.Model:
    graph = export_graph(net.module, net.shape)
    call.stage("reading the network")
    return graph


def _canonical(net: Network, call: Call) -> Canonical:
    canonical = canonicalize(_graph(net, call))
    call.stage("canonical graph")
    return canonical


def onnx(source: Path, target: Path) -> Call:
    """The canonical ONNX file."""
    net = load(source)
    with Call() as call:
        save(_canonical(net, call).model, target)
        call.stage("writing")
    return call


def artifact(source: Path, target: Path, *, engine: EngineChoice) -> Call:
    """The whole folder for a device with one engine: LoRA-C of rank 4 on all convolutions, base.tflite in float32."""
    net, config = load(source), ArtifactConfig(lora=LoraConfig(rank=4), engine=engine, tflite="float32")
    with Call() as call:
        write_artifact(_graph(net, call), target, name=net.name, spec=net.spec, class_names=CLASS_NAMES, config=config)
        call.stage("artifact")
    return call


def tflite(source: Path, target: Path, *, weights: Weights) -> Call:
    """The .tflite file."""
    net, images = load(source), None
    if weights == "int8":
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, *net.shape[1:], 3), dtype=np.uint8)
    with Call() as call:
        model = _canonical(net, call).model
        export(
            *(model, target, TfliteConfig(weights)),
            spec=net.spec,
            class_names=CLASS_NAMES,
            name=net.name,
            calibration=images,
        )
        call.stage("TFLite")
    return call


CONVERTERS: dict[str, Converter] = {
    "onnx": onnx,
    **{f"artifact {engine}": functools.partial(artifact, engine=engine) for engine in ENGINES},
    **{f"tflite {weights}": functools.partial(tflite, weights=weights) for weights in WEIGHTS},
}

if __name__ == "__main__":
    sys.exit(main(CONVERTERS))
