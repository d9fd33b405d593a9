"""What is made of a network, and by whom: worker, environment, and the file that it starts from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import interpreters as envs
from benchmarks.converting import saved_onnx, saved_program
from benchmarks.networks import Network
from lorac_exporters.choices import EngineChoice
from lorac_exporters.tflite_config import WEIGHTS, Weights

OURS = "ours"
ENGINES: tuple[EngineChoice, ...] = ("onnxruntime", "onnxruntime-training")
OUR_WORKER, OTHERS_WORKER = "benchmarks.export_ours", "benchmarks.tflite_convert"
PYTORCH, ONNX = "a PyTorch network", "an ONNX file"
SHAPE = "shape.json"  # of an image, beside network.pt
SUFFIXES = {"artifact": "", "onnx": ".onnx", "tflite": ".tflite", "pte": ".pte"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """``name`` is the worker's; ``source`` what it starts from, the file of which is called ``file``.

    ``once``: too slow to be repeated. ``seconds``: whether it takes no more than some.
    """

    name: str
    variant: str
    environment: str
    format: str
    precision: Weights
    worker: str
    file: str
    source: str = PYTORCH
    once: bool = False
    seconds: bool = False

    def target(self, folder: Path) -> Path:
        """Where the result goes."""
        return folder / f"{self.name.replace(' ', '-')}{SUFFIXES[self.format]}"


def _ours(name: str, variant: str, kind: str, precision: Weights = "float32") -> Conversion:
    return Conversion(name, variant, envs.PROJECT, kind, precision, OUR_WORKER, "network.pt", seconds=True)


def _other(name: str, kind: str, file: str, source: str = PYTORCH, *, once: bool = False) -> Conversion:
    return Conversion(
        name, name, name, kind, "float32", OTHERS_WORKER, file, source, once, seconds=name == envs.ONNXSIM
    )


CANONICAL = _ours("onnx", OURS, "onnx")
ARTIFACT = {engine: _ours(f"artifact {engine}", f"{OURS}, engine {engine}", "artifact") for engine in ENGINES}
TFLITE = {weights: _ours(f"tflite {weights}", OURS, "tflite", weights) for weights in WEIGHTS}
CONVERSIONS = (
    *(CANONICAL, *ARTIFACT.values(), *TFLITE.values()),
    _other(envs.LITERT_TORCH, "tflite", "network.pt2"),
    _other(envs.ONNX2TF, "tflite", "network.onnx", ONNX, once=True),
    _other(envs.EXECUTORCH, "pte", "network.pt2"),
    _other(envs.ONNXSIM, "onnx", "onnx.onnx", ONNX),  # our canonical file
)


@dataclasses.dataclass
class Made:
    """What workers said of a conversion, round by round, or why there is nothing."""

    said: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    reason: str = ""


def write_sources(net: Network, folder: Path) -> None:
    """The network in every form that a conversion starts from, but for our canonical file."""
    torch.save(net.module, folder / "network.pt")
    (folder / SHAPE).write_text(json.dumps(net.shape))
    saved_program(net, folder)
    saved_onnx(net, folder)
