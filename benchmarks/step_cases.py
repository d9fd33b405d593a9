"""Networks, artifacts and batches for the measurements of training steps, all from one set of numbers."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from benchmarks.interpreters import ROOT
from benchmarks.step_competitors import SIMPLIFIED, variants
from benchmarks.step_protocol import NETWORK
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_exporters.artifact import write_artifact
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.manifest import InputSpec

CLASSES = 10
CALIBRATION = 16  # images


class Case:
    """One network in ``folder``: its artifacts by variant and its batches by size, each made when first asked for.

    A CIFAR stem is used wherever the model has one; images are ``size`` x ``size``.
    """

    def __init__(self, model: str, folder: Path, *, size: int) -> None:
        self.model, self.folder = model, folder
        folder.mkdir(parents=True)
        self._spec = InputSpec("input", (3, size, size), 1 / 255, (0.5,) * 3, (0.25,) * 3)
        module = build(ModelSpec(model, classes=CLASSES, cifar_stem=MODELS[model].small_stem is not None))
        calibrate(module, self._spec.shape)
        self._graph = export_graph(module, self._spec.shape)
        torch.save(without_torchvision(fold_batchnorm(module)), folder / NETWORK)
        self.simplified: dict[str, list[int]] = {}  # nodes before and after, by graph

    def artifact(self, variant: str, *, onnxsim: Path | None = None) -> Path:
        """The folder of a variant; ``onnxsim`` is the interpreter that simplifies."""
        folder = self.folder / variant
        if folder.exists():
            return folder
        if variant == SIMPLIFIED:
            if onnxsim is None:
                raise ValueError("simplifying an artifact needs the interpreter of the environment with onnxsim")
            self._simplify(onnxsim, folder)
            return folder
        write_artifact(
            ir.Model.clone(self._graph),
            folder,
            name=self.model,
            spec=self._spec,
            class_names=tuple(str(i) for i in range(CLASSES)),
            config=variants(self.model)[variant],
        )
        return folder

    def _simplify(self, interpreter: Path, folder: Path) -> None:
        command = [interpreter, "-m", "benchmarks.step_simplify", self.artifact("r"), folder]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"onnxsim could not simplify {self.model}: {done.stderr.strip().splitlines()[-1:]}")
        self.simplified = json.loads(done.stdout.splitlines()[-1])

    def batch(self, count: int) -> Path:
        """A file with ``count`` images and labels; the same numbers each time."""
        path = self.folder / f"batch{count}.npz"
        if not path.exists():
            rng = np.random.default_rng(count)
            images = rng.standard_normal((count, *self._spec.shape)).astype(np.float32)
            np.savez(path, images=images, labels=rng.integers(0, CLASSES, count))
        return path


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


def without_torchvision(module: nn.Module) -> nn.Module:
    """The same network, traced if its class is torchvision's: PyTorch should not have to import that to train."""
    return fx.symbolic_trace(module) if type(module).__module__.startswith("torchvision") else module


def cases(models: Iterable[str], scratch: Path, *, size: int) -> Iterable[Case]:
    """A case for each model, its folder removed before the next one."""
    for model in models:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            yield Case(model, Path(folder) / model, size=size)
