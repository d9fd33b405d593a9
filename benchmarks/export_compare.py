"""Do files that were made of one network answer alike? Each is run by its own runtime, on one random image."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import interpreters as envs
from benchmarks.export_conversions import CANONICAL, CONVERSIONS, Conversion, Made
from benchmarks.networks import Network

RUNNERS = {"onnx": envs.PROJECT, "tflite": envs.LITERT, "pte": envs.EXECUTORCH}  # who runs a file
IMAGE = "image.npy"


def compared(net: Network, folder: Path, made: Mapping[str, Made], given: Mapping[str, Path]) -> dict[str, float | str]:
    """By conversion: how far answers lie from ours, relative to the largest logit, or why that is not known."""
    pixels = np.random.default_rng(1).integers(0, 256, (1, *net.shape))  # like those that int8 is calibrated with
    image = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    np.save(folder / IMAGE, image)
    with torch.no_grad():
        expected = np.asarray(net.module(torch.from_numpy(image)), np.float64).ravel()
    found: dict[str, float | str] = {}
    for conversion in CONVERSIONS:
        logits = _answers(conversion, folder, made[conversion.name], given)
        found[conversion.name] = logits if isinstance(logits, str) else difference(logits, expected)
        if conversion == CANONICAL and not isinstance(logits, str):
            expected = np.asarray(logits)
    return found


def difference(logits: Sequence[float], expected: Any) -> float:
    """Largest absolute difference, relative to the largest expected logit.

    >>> difference([1.0, -4.5], np.array([1.0, -4.0]))
    0.125
    """
    return float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())


def _answers(conversion: Conversion, folder: Path, made: Made, given: Mapping[str, Path]) -> list[float] | str:
    """What a file answers, or why that is not known."""
    if conversion.format not in RUNNERS:
        return "a folder: its base.onnx is our canonical file"
    if made.reason:
        return made.reason
    try:
        interpreter = envs.python(RUNNERS[conversion.format], given)
    except FileNotFoundError as err:
        return str(err)
    command = [interpreter, "-m", "benchmarks.export_answers", conversion.target(folder), folder / IMAGE]
    done = subprocess.run([str(c) for c in command], cwd=envs.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"the file does not run: {' '.join(done.stderr.split()[-40:])}"
    logits: list[float] = json.loads(done.stdout)
    return logits
