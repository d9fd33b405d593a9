"""docs/specification.md: a reader, trainer and fuser written from that page alone do what this project does."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spec_fuser
import spec_reader
import spec_trainer
import torch
from small_artifacts import LORA, export, network
from spec_reader import Artifact
from torch import nn

from lorac_runtime import patch
from lorac_runtime.adapter import load_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.manifest import load
from lorac_runtime.schedule import one_cycle

RAW = np.random.default_rng(5).integers(0, 256, (16, 10, 10, 3)).astype(np.uint8)
ALL = dataclasses.replace(LORA, biases="all", learnable_alpha=True)


def unfoldable() -> nn.Sequential:
    """A batch normalisation behind a ReLU, and one that multiplies two channels by zero and by hardly anything."""
    net = network()
    with torch.no_grad():
        net[1].weight[:2] = torch.tensor([0.0, 1e-30])
    layers = [*net[:5], nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), *net[5:]]
    nn.init.normal_(layers[5].weight)
    return nn.Sequential(*layers).eval()


CASES: dict[str, dict[str, Any]] = {
    "lora-c": {"lora": ALL},
    "paper, fp16": {"lora": dataclasses.replace(LORA, layout="paper"), "tflite": "fp16"},
    "int8": {"lora": ALL, "tflite": "int8", "calibration": RAW},
    "kernels": {"method": "lora-kernel", "lora": dataclasses.replace(LORA, rank=1)},
    "paca": {"method": "paca"},
    "full, batch": {"method": "full", "bn_policy": "batch"},
    "lora-c, batch": {"lora": ALL, "bn_policy": "batch"},
    "lora-c, recalibrate": {"lora": ALL, "bn_policy": "recalibrate"},
    "bn": {"method": "bn"},
    "head behind a frozen front": {"method": "head"},
    "unfoldable, batch": {"net": unfoldable(), "lora": ALL, "bn_policy": "batch"},
    "unfoldable, recalibrate": {"net": unfoldable(), "lora": ALL, "bn_policy": "recalibrate"},
    "unfoldable, full": {"net": unfoldable(), "method": "full"},
    "unfoldable, tent": {"net": unfoldable(), "method": "tent"},
}
ORACLES = ("spec_reader", "spec_fuser", "spec_trainer")
STANDARD = {"__future__", "collections", "hashlib", "json", "math", "pathlib", "struct", "typing"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Artifacts by case, each exported once. Read only."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("artifact") / "a"
            export(made[case], **CASES[case])
        return made[case]

    return get


def moved(artifact: Artifact) -> dict[str, np.ndarray]:
    """A state as training might leave it: every tensor a little elsewhere, variances positive."""
    rng, own = np.random.default_rng(1), artifact.state | {}
    found = {n: (v + rng.normal(0, 0.2, v.shape)).astype(np.float32) for n, v in own.items()}
    return {n: np.abs(v) + np.float32(0.1) if n.endswith("running_var") else v for n, v in found.items()}


def imported(name: str, root: Path) -> Iterator[str]:
    """Top-level packages that a file of tests imports."""
    for node in ast.walk(ast.parse((root / "tests" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_the_oracles_import_nothing_of_this_project(root: Path) -> None:
    found = {package for name in ORACLES for package in imported(name, root)}
    assert found == {*ORACLES[:1], "numpy", "onnxruntime", *STANDARD}


@pytest.mark.parametrize("case", CASES)
def test_fused_files_are_the_products_byte_for_byte(case: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = spec_reader.read(folder(case))
    state = moved(artifact)
    for file in ("base.onnx", "base.tflite"):
        patch.fuse(artifact.folder, tmp_path / file, state, base=file)
        expected = (tmp_path / file).read_bytes()
        assert expected != (artifact.folder / file).read_bytes()
        assert spec_fuser.fused(artifact, state, file) == expected


@pytest.mark.parametrize("case", ["lora-c", "lora-c, batch", "head behind a frozen front"])
def test_steps_are_the_products(case: str, folder: Callable[[str], Path]) -> None:
    artifact, manifest = spec_reader.read(folder(case)), load(folder(case))
    labels = np.arange(16) % 4
    x = spec_trainer.normalised(artifact.manifest["input"], RAW)
    batches = [(x[:8], labels[:8]), (x[8:], labels[8:]), (x[:8], labels[:8])]
    state, losses = spec_trainer.trained(artifact, batches)
    engine = open_engine(folder(case), manifest, engine="onnxruntime", threads=1)
    rates = [one_cycle(s, 3, peak=manifest.training.lr, warmup=manifest.training.warmup) for s in range(3)]
    assert [engine.train_step(*batch, lr) for batch, lr in zip(batches, rates, strict=True)] == losses
    assert bool(artifact.manifest["features"]) == (case == "head behind a frozen front")
    product = engine.state()
    assert all(np.array_equal(product[n], v) for n, v in state.items())
    start = load_adapter(folder(case) / "adapter.safetensors").tensors
    assert any(not np.array_equal(start[n], state[n]) for n in start)
