"""Helpers for tests of whole fine-tuning runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny_network import CLASSES, W

from lorac_runtime.data import stratified_split
from lorac_runtime.report import FinetuneReport
from lorac_runtime.training import Progress

IMAGES = 60


def write_data(path: Path, count: int = IMAGES, seed: int = 0) -> Path:
    """Noisy images whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    noise = rng.normal(80, 30, (count, W, W, 3)) + 50 * labels[:, None, None, None]
    np.savez(path, images=np.clip(noise, 0, 255).astype(np.uint8), labels=labels)
    return path


def normalised(images: np.ndarray) -> np.ndarray:
    """What the tiny artifact's input spec says, written again."""
    return (images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_onnx(path: Path, images: np.ndarray, name: str = "input") -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: images})[0]


def held_out(report: FinetuneReport, data: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(data) as file:
        _, index = stratified_split(file["labels"], report.settings.val_fraction, report.seed)
        return normalised(file["images"][index]), file["labels"][index]


class StopError(Exception):
    """Raised by a test in mid-run."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return on_progress


def in_new_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
