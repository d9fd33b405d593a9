"""Small networks of signals with their input, data and artifacts, for tests."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from exporter_graphs import randomize
from shared_export import export_graph
from torch import nn

from lorac_deploy.signal_nets import Cnn1d, Mlp
from lorac_exporters.artifact import ArtifactConfig, ExportReport, write_artifact
from lorac_runtime.manifest import InputSpec, TrainingDefaults

CLASSES = ("idle", "sound", "worn")
SHAPES = {"mlp": (20,), "cnn1d": (2, 40), "normed": (20,)}
SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0)


def network(name: str, *, smooth: bool = False) -> nn.Module:
    """In evaluation mode, BN away from its start. ``normed`` has BN behind fully connected layers, one without bias."""
    torch.manual_seed(0)
    activation: nn.Module = nn.Tanh() if smooth else nn.ReLU()
    if name == "normed":
        first, second = nn.Linear(20, 12), nn.Linear(12, 10, bias=False)
        layers = (first, nn.BatchNorm1d(12, eps=1e-3), activation, second, nn.BatchNorm1d(10, momentum=0.3), activation)
        return randomize(nn.Sequential(*layers, nn.Linear(10, 3)))
    net = Mlp(20, 3) if name == "mlp" else Cnn1d(2, 3)
    net.relu = activation
    return randomize(net)


def spec_of(name: str) -> InputSpec:
    shape = SHAPES[name]
    channels = shape[0] if len(shape) == 2 else 1
    mean, std = tuple(0.1 * i for i in range(channels)), tuple(0.5 + i for i in range(channels))
    return InputSpec("input", shape, 1.0, mean, std, dtype="float32")


def signals(name: str, count: int = 60, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose class is told by which third is louder, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    samples = rng.normal(size=(count, *SHAPES[name]))
    third = SHAPES[name][-1] // 3
    for sample, label in zip(samples, labels, strict=True):
        sample[..., label * third : (label + 1) * third] += 1.5
    return samples.astype(np.float32), labels


def write_data(path: Path, name: str, count: int = 60, *, seed: int = 0) -> Path:
    samples, labels = signals(name, count, seed=seed)
    np.savez(path, samples=samples, labels=labels)
    return path


@functools.cache
def exported(name: str, *, smooth: bool) -> ir.Model:
    """The raw graph of a network; the exporter works on copies of it."""
    return export_graph(network(name, smooth=smooth), SHAPES[name])


def artifact(
    out: Path,
    name: str,
    *,
    smooth: bool = False,
    calibration: np.ndarray | None = None,
    **fields: object,
) -> ExportReport:
    config = dataclasses.replace(ArtifactConfig(training=SGD), **fields)  # type: ignore[arg-type]
    graph, spec = exported(name, smooth=smooth), spec_of(name)
    return write_artifact(graph, out, name=name, spec=spec, class_names=CLASSES, config=config, calibration=calibration)
