"""Artifacts of a network of three layers, exported within a second."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from shared_export import export_graph
from torch import nn

from lorac_exporters.artifact import ArtifactConfig, ExportReport, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_runtime.manifest import InputSpec

SPEC = InputSpec("input", (3, 10, 10), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("a", "b", "c", "d")
LORA = LoraConfig(rank=2, rank_mode="r")


def network(*, width: int = 16, norm: bool = True, activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, bias=False)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    layers += [activation or nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    if norm:
        nn.init.uniform_(net[1].running_var, 0.5, 2.0)
        nn.init.normal_(net[1].running_mean)
    return net.eval()


@functools.cache
def exported() -> ir.Model:
    """The default network's raw graph; the exporter works on copies of it."""
    return export_graph(network(), SPEC.shape)


def export(
    out: Path,
    net: nn.Module | None = None,
    *,
    spec: InputSpec = SPEC,
    adapter: Path | None = None,
    calibration: npt.NDArray[np.uint8] | None = None,
    **fields: object,
) -> ExportReport:
    config = dataclasses.replace(ArtifactConfig(lora=LORA), **fields)  # type: ignore[arg-type]
    graph = exported() if net is None else export_graph(net, SPEC.shape)
    return write_artifact(
        graph, out, name="net", spec=spec, class_names=NAMES, config=config, adapter=adapter, calibration=calibration
    )
