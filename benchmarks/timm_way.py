"""A network on the way that a user's goes; how far it comes is a `Row`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.timm_row import FLOAT32, Row
from lorac_deploy.batchnorm import recalibrate, restore_policy
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.export import export_training_artifact
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, attach
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.artifact import ArtifactConfig, adapter_metadata
from lorac_exporters.engine_files import obstacles
from lorac_exporters.graphs import build_graphs
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.plan import LoraConfig
from lorac_exporters.task_config import TaskConfig
from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import save_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.manifest import InputSpec, Manifest, TrainingDefaults
from lorac_runtime.patch import fuse
from lorac_runtime.tasks import CLASSIFICATION, IGNORED, LABELS

CLASSES, BATCH = 10, 1
BATCHES = 8  # on one, rounding may flip a ReLU, of which the gradient jumps; a wrong gradient is wrong on all
LORA = LoraConfig(rank=2)
SATURATED = 1e-3  # a loss so small has hardly a gradient to compare
RATE = 1000.0  # so large that a change outweighs the rounding of the tensor it is added to
SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0, momentum=0.0, weight_decay=0.0)
Arrays = Mapping[str, Any]


def go(name: str, family: str, pixels: int) -> Row:
    """Measure the network called ``timm/name`` on images of ``pixels`` x ``pixels``."""
    return measured(ModelSpec(f"timm/{name}", CLASSES), Row(name, family, pixels))


def measured(spec: ModelSpec, row: Row) -> Row:
    """Measure a network with random numbers on images of the row's size, for the task of ``spec``."""
    torch.set_num_threads(1)
    started, pixels = time.perf_counter(), row.pixels
    shape = (3, pixels, pixels)
    net = lively(build(spec), shape)
    row = dataclasses.replace(row, parameters=sum(p.numel() for p in net.parameters()))
    with tempfile.TemporaryDirectory(prefix="way.") as folder:
        row = _way(row, net, spec, Path(folder))
    return dataclasses.replace(row, seconds=time.perf_counter() - started)


def lively(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """In evaluation mode, no tensor at a start that hides errors: scales of zeros or ones, shifts of zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                low, high = (-0.2, 0.2) if name.endswith("bias") else (0.5, 1.0)
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules()):
        recalibrate(net, [torch.randn(8, *shape, generator=generator)])
        restore_policy(net)
    return net.eval()


def _way(row: Row, net: nn.Module, spec: ModelSpec, folder: Path) -> Row:
    """Stage by stage; the first that fails is the last."""
    shape = (3, row.pixels, row.pixels)
    input_spec = InputSpec("input", shape, 1 / 255, (0.5,) * 3, (0.25,) * 3)
    names = tuple(f"c{k}" for k in range(CLASSES))
    with _stage() as said:
        save_checkpoint(folder / "base", net, spec, input_spec=input_spec, class_names=names, metrics={})
        report = attach(copy.deepcopy(net), LORA)
        row = dataclasses.replace(row, adapters=len(report.adapters))
    row = dataclasses.replace(row, attach=said[0])
    if said[0]:
        return row
    with _stage() as said:
        config = ArtifactConfig(lora=LORA, engine="onnxruntime", training=SGD, task=TaskConfig(spec.task))
        made = export_training_artifact(folder / "base", folder / "a", config=config, on_progress=lambda _: None)
        row = dataclasses.replace(
            row, tflite=made.no_tflite, training=_training_obstacles(folder / "a" / mf.BASE, input_spec, spec)
        )
    row = dataclasses.replace(row, export=said[0])
    if said[0]:
        return row
    with _stage() as said:
        return _on_the_device(row, net, folder)
    return dataclasses.replace(row, fuse=said[0])


def _on_the_device(row: Row, net: nn.Module, folder: Path) -> Row:
    """A step in PyTorch and on the engine, from the same adapters, on one batch after the other until they agree."""
    manifest = mf.load(folder / "a")
    twin = touched(fold_batchnorm(net, pairs=folded_pairs(manifest)))
    start = {name: value.numpy() for name, value in adapter_tensors(twin).items()}
    engine = open_engine(folder / "a", manifest, engine="onnxruntime", threads=1)
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        images = rng.standard_normal((BATCH, *manifest.input.shape)).astype(np.float32)
        labels = _labels(rng, manifest)
        engine.load_state(start)
        loss = engine.train_step(engine.inputs(images), {LABELS: labels} if manifest.task else labels, RATE)
        found = {n: (start[n].astype(np.float64) - value) / RATE for n, value in engine.state().items()}
        if loss < SATURATED:
            continue
        row = min(row, _compared(row, twin, (images, labels), (loss, found)), key=_far)
        if _far(row) <= FLOAT32:
            break
    moved = {n: value - small_step(value, found[n]) for n, value in start.items()}
    return _fused(row, manifest, {n: value.astype(np.float32) for n, value in moved.items()}, folder)


def _labels(rng: np.random.Generator, manifest: Manifest) -> Any:
    """A class for each image, or for each pixel, of which a tenth has none."""
    if manifest.task is None:
        return rng.integers(0, CLASSES, BATCH)
    labels = rng.integers(0, CLASSES, (BATCH, *manifest.input.shape[1:]))
    return np.where(rng.random(labels.shape) < 0.1, IGNORED, labels)


def _far(row: Row) -> float:
    return math.inf if row.step_error is None else row.step_error


def folded_pairs(manifest: Manifest) -> dict[str, str]:
    """BN layer -> the convolution into which the export folded it."""
    layers = {bn.weight.rpartition(".")[0]: bn.folded_into for bn in manifest.batchnorms}
    return {bn: into[0].rpartition(".")[0] for bn, into in layers.items() if into and into[0].rpartition(".")[0] != bn}


def small_step(value: Any, gradient: Any) -> Any:
    """A part of the gradient that changes the tensor by a hundredth of its norm."""
    return gradient * (0.01 * np.linalg.norm(value) / max(float(np.linalg.norm(gradient)), 1e-12))


def _compared(row: Row, twin: nn.Module, batch: tuple[Any, Any], ours: tuple[float, Arrays]) -> Row:
    exact, single = (stepped(twin, *batch, dtype) for dtype in (torch.float64, torch.float32))
    return dataclasses.replace(
        row,
        loss_error=abs(ours[0] - exact[0]) / exact[0],
        step_error=farthest(ours[1], exact[1]),
        torch_error=farthest(single[1], exact[1]),
    )


def _fused(row: Row, manifest: Manifest, state: Arrays, folder: Path) -> Row:
    with _stage() as said:
        fuse(folder / "a", folder / "fused.onnx", state)
        save_adapter(folder / mf.ADAPTER, dict(state), adapter_metadata(manifest))
    row = dataclasses.replace(row, fuse=said[0])
    row = dataclasses.replace(row, dropin=_differences(folder, "onnx"))
    if row.tflite == "":
        fuse(folder / "a", folder / "fused.tflite", state, base=mf.BASE_TFLITE)
        row = dataclasses.replace(row, tflite_dropin=_differences(folder, "tflite"))
    return row


def _differences(folder: Path, form: str) -> str:
    """What keeps the fused file from being a drop-in; "" if it is one."""
    with _stage() as said:
        report = verify(folder / "a" / f"base.{form}", folder / f"fused.{form}", adapter=folder / mf.ADAPTER)
        failed = [f"{c.name}: {c.verdict}, {c.detail}" for c in report.checks if c.verdict != "pass"]
        said[0] = "; ".join(failed)
    return said[0]


@contextlib.contextmanager
def _stage() -> Iterator[list[str]]:
    """A list of one text: "" if the stage went well, else the project's own words for what is in the way."""
    said = [""]
    try:
        yield said
    except (LoracDeployError, ValueError) as err:
        said[0] = " ".join(str(err).split())


def touched(net: nn.Module) -> nn.Module:
    """With adapters that do something."""
    attach(net, LORA)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("lora_b"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    return net


def stepped(net: nn.Module, images: Any, labels: Any, dtype: torch.dtype) -> tuple[float, Arrays]:
    """The loss, and the gradient of every tensor that trains, in ``dtype``."""
    twin = copy.deepcopy(net).to(dtype).eval()  # dropout off, as on the device
    scores = twin(torch.from_numpy(images).to(dtype))
    loss = nn.functional.cross_entropy(scores, torch.from_numpy(labels), ignore_index=IGNORED)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.double().numpy() for n, p in twin.named_parameters() if p.grad is not None}
    return loss.item(), {n: found[n] for n in adapter_tensors(net) if n in found}


def farthest(found: Arrays, exact: Arrays) -> float:
    """The largest distance over all tensors, relative in norm to the tensor; absolute where that is zero."""
    largest = 0.0
    for name, value in exact.items():
        norm, apart = float(np.linalg.norm(value)), float(np.linalg.norm(found[name] - value))
        largest = max(largest, apart / norm if norm > 1e-12 else apart)
    return largest


def _training_obstacles(base: Path, spec: InputSpec, model: ModelSpec) -> str:
    """Operators that onnxruntime-training cannot differentiate in this network; none: ""."""
    if model.task != CLASSIFICATION:
        return "it has the loss of classifiers only"
    settings: dict[str, Any] = {"spec": spec, "classes": CLASSES, "new_head": False, "method": "lora-c", "lora": LORA}
    problems = obstacles(build_graphs(read_graph(base), policy="frozen", **settings), "onnxruntime-training")
    return ", ".join(sorted({f"{p.operator} ({p.reason})" for p in problems}))
