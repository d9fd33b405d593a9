"""Networks, artifacts and batches for the measurements of training steps, all from one set of numbers."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from benchmarks.interpreters import ROOT
from benchmarks.step_competitors import SIMPLIFIED, TORCH_WORKER, VARIANTS, Competitor
from benchmarks.step_protocol import Job
from benchmarks.step_torch_networks import prepare_like, save_network, use_branches
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_exporters.artifact import write_artifact
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.manifest import InputSpec

CLASSES = 10
CALIBRATION = 16  # images


class Case:
    """One network in ``folder``: its artifacts by variant and its batches by size, each made when first asked for.

    Without a ``module`` it is a fresh one, with a CIFAR stem wherever the model has one; images are those of ``spec``.
    """

    def __init__(self, model: str, folder: Path, *, spec: InputSpec, module: nn.Module | None = None) -> None:
        self.model, self.folder, self.spec = model, folder, spec
        folder.mkdir(parents=True)
        module = fresh(model, spec.shape) if module is None else module
        self._graph = export_graph(module, spec.shape)
        self._folded = fold_batchnorm(module)
        self.simplified: dict[str, list[int]] = {}  # nodes before and after, by graph

    def job(self, competitor: Competitor, *, batch: int, threads: int, onnxsim: Callable[[], Path]) -> Job:
        """What a competitor is told; ``onnxsim`` finds the interpreter that simplifies."""
        artifact = self.artifact(competitor.variant, onnxsim=onnxsim)
        options = dict(competitor.options)
        if competitor.worker == TORCH_WORKER:
            options["network"] = str(self.network(competitor.variant, options.pop("form")))
        return Job(str(artifact), str(self.batch(batch)), threads, options)

    def artifact(self, variant: str, *, onnxsim: Callable[[], Path] | None = None) -> Path:
        """The folder of a variant; ``onnxsim`` finds the interpreter that simplifies."""
        folder = self.folder / variant
        if folder.exists():
            return folder
        if variant == SIMPLIFIED:
            if onnxsim is None:
                raise ValueError("simplifying an artifact needs the interpreter of the environment with onnxsim")
            self._simplify(onnxsim(), folder)
            return folder
        write_artifact(
            ir.Model.clone(self._graph),
            folder,
            name=self.model,
            spec=self.spec,
            class_names=tuple(str(i) for i in range(CLASSES)),
            config=VARIANTS[variant],
        )
        return folder

    def network(self, variant: str, form: str) -> Path:
        """The PyTorch network of a variant, its adapters as ``weight`` updates or as thin ones (``branch``)."""
        path = self.folder / f"{variant}-{form}.pt"
        if not path.exists():
            network = copy.deepcopy(self._folded)
            prepare_like(network, self.artifact(variant))
            if form == "branch":
                use_branches(network)
            save_network(network, path)
        return path

    def _simplify(self, interpreter: Path, folder: Path) -> None:
        command = [interpreter, "-m", "benchmarks.step_simplify", self.artifact("lora-c"), folder]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"onnxsim could not simplify {self.model}: {done.stderr.strip().splitlines()[-1:]}")
        self.simplified = json.loads(done.stdout.splitlines()[-1])

    def batch(self, count: int) -> Path:
        """A file with ``count`` images and labels; the same numbers each time."""
        path = self.folder / f"batch{count}.npz"
        if not path.exists():
            rng = np.random.default_rng(count)
            images = rng.standard_normal((count, *self.spec.shape)).astype(np.float32)
            np.savez(path, images=images, labels=rng.integers(0, CLASSES, count))
        return path

    def local(self, count: int) -> Path:
        """A file with ``count`` raw images and labels, as a device has them."""
        path = self.folder / f"local{count}.npz"
        if not path.exists():
            rng, (channels, *size) = np.random.default_rng(count), self.spec.shape
            images = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
            np.savez(path, images=images, labels=rng.integers(0, CLASSES, count))
        return path


def image_spec(size: int) -> InputSpec:
    """Colour images of ``size`` x ``size``."""
    return InputSpec("input", (3, size, size), 1 / 255, (0.5,) * 3, (0.25,) * 3)


def fresh(model: str, shape: tuple[int, ...]) -> nn.Module:
    """A network with random weights whose activations have sound sizes."""
    module = build(ModelSpec(model, classes=CLASSES, cifar_stem=MODELS[model].small_stem is not None))
    calibrate(module, shape)
    return module


def calibrate(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give BN layers the statistics of random images, in place, and leave the network in evaluation mode.

    With those of a fresh network, activations of deep ones fade until gradients are subnormal numbers, which are slow.
    """
    norms = [(m, m.momentum) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, _ in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        module.train()(torch.randn(CALIBRATION, *shape, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in norms:
        norm.momentum = momentum
    module.eval()
