"""Other converters: what they are given, and a fresh process for each conversion.

litert-torch and ExecuTorch are given the network as torch.export saves it, onnx2tf as torch.onnx exports it: onnx2tf
1.29.24 reads the layout of base.onnx wrongly and stops.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.interpreters import ROOT
from benchmarks.networks import Network


def other_file(net: Network, converter: str, interpreter: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of another converter, and what its worker says of the conversion.

    Raises RuntimeError with the converter's last words if it fails.
    """
    source = (saved_program if converter == "litert-torch" else saved_onnx)(net, folder)
    target = folder / f"{converter}.tflite"
    return target, converted(interpreter, "benchmarks.tflite_convert", converter, source, target)


def converted(interpreter: Path, module: str, name: str, source: Path, target: Path) -> dict[str, Any]:
    """What a worker says of one conversion, made in a fresh process. Raises RuntimeError with its last words."""
    command = [str(part) for part in (interpreter, "-m", module, name, source, target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(done.stderr.split()[-60:])}")
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def saved_program(net: Network, folder: Path) -> Path:
    """The network as torch.export saves it, for one image."""
    path = folder / "network.pt2"
    torch.export.save(torch.export.export(net.module, (torch.zeros(1, *net.shape),)), path)
    return path


def saved_onnx(net: Network, folder: Path) -> Path:
    """The network as torch.onnx writes it, for one image."""
    path, example = folder / "network.onnx", (torch.zeros(1, *net.shape),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told to be the legacy exporter, which warns that it is
        torch.onnx.export(
            net.module, example, path, dynamo=False, opset_version=17, input_names=["input"], output_names=["output"]
        )
    return path
