"""What fused models answer: the files that an app would load, run on samples as an app would run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines import wheel
from lorac_runtime.engines.native import PROVIDERS, frugal, return_freed_memory, session_options, translated
from lorac_runtime.errors import EngineError
from lorac_runtime.manifest import Manifest
from lorac_runtime.training import Samples

ENGINE = "onnxruntime"


def logits(path: Path, manifest: Manifest, samples: Samples, *, threads: int | None, at_once: int) -> npt.NDArray[Any]:
    """Logits (samples, classes) float32 of an ONNX model for all samples, ``at_once`` at a time.

    Raises EngineError if onnxruntime is missing or refuses the file, MemoryError.
    """
    ort = wheel.load_inference()
    return_freed_memory()
    with translated(ENGINE, f"run {path}"):
        session = ort.InferenceSession(str(path), frugal(session_options(ort, threads)), providers=list(PROVIDERS))
        found = [
            session.run([manifest.output.name], {manifest.input.name: samples.images(index)})[0]
            for index in _pieces(samples.index, at_once)
        ]
    answers = np.concatenate([np.asarray(values, np.float32) for values in found])
    if answers.shape != (len(samples), manifest.output.classes):
        expected = (len(samples), manifest.output.classes)
        raise EngineError(f"{path} answers with the shape {answers.shape}, expected {expected}")
    return answers


def _pieces(index: npt.NDArray[np.int64], at_once: int) -> list[npt.NDArray[np.int64]]:
    return [index[start : start + at_once] for start in range(0, len(index), at_once)]
