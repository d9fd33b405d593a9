"""What the checks of a fused file are measured against: the artifact's own files, and its unfused training graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_exporters.running import joined
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, to_manifest_coordinates
from lorac_runtime.engines import open_engine
from lorac_runtime.engines.engine import Labels
from lorac_runtime.errors import ArtifactError
from lorac_runtime.patch import batchnorm_tensors

UNFUSED_CHECK = "fused against the unfused training graph"
SAMPLES = 8


def is_entry(path: Path, entry: mf.FileEntry) -> bool:
    """Whether a file is the one that a manifest lists. Raises ArtifactError if it is missing."""
    if not path.is_file():
        raise ArtifactError(f"{path} not found")
    return path.stat().st_size == entry.nbytes and mf.sha256(path) == entry.sha256


def patches_of(manifest: mf.Manifest, file: str) -> list[mf.Patch]:
    """The patch table of one of the artifact's base files."""
    return [patch for patch in manifest.patches if patch.file == file]


def no_adapter(path: Path) -> str:
    """What to say where the adapter is missing."""
    return f"{path.name} not found beside the fused file; name it with --adapter"


def adapted_state(folder: Path, manifest: mf.Manifest, adapter: Path) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors of an adapter file as the artifact wants them.

    Raises AdapterError if it cannot be read or does not fit the artifact.
    """
    return to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), load_adapter(adapter))


def unfused_logits(
    folder: Path, manifest: mf.Manifest, state: Mapping[str, npt.NDArray[Any]], images: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """What the artifact's evaluation graph answers with the adapter beside the weights: as `run_onnx` does.

    ``state`` is `adapted_state`, ``images`` are in the form that the model takes: `random_inputs`.

    Raises EngineError if no engine is installed.
    """
    engine = open_engine(folder, manifest, threads=None)
    engine.load_state(state)
    _, logits = engine.eval_step(images, _any_targets(manifest, len(images)))
    return logits


def _any_targets(manifest: mf.Manifest, count: int) -> Labels:
    """Zeros of the kind that the loss compares with: what it comes to does not matter."""
    if manifest.task is None:
        return np.zeros(count, np.int64)
    return {t.name: np.zeros((count, *t.shape), t.dtype) for t in manifest.task.targets}


def random_inputs(spec: mf.InputSpec, count: int, *, seed: int) -> npt.NDArray[Any]:
    """Random inputs in the form the model takes: (count, *spec.shape) float32, or (count, H, W, C) uint8."""
    if spec.in_graph:
        return random_raw(spec, count, seed=seed)
    return np.random.default_rng(seed).standard_normal((count, *spec.shape), dtype=np.float32)


def random_raw(spec: mf.InputSpec, count: int, *, seed: int) -> npt.NDArray[Any]:
    """Raw random samples: images uint8 (count, H, W, C), or signals float32 that `preprocess` makes standard normal."""
    rng = np.random.default_rng(seed)
    if spec.is_image:
        return rng.integers(0, 256, (count, *spec.raw_shape), dtype=np.uint8)
    column = (spec.channels, *[1] * (len(spec.shape) - 1))
    mean, std = (np.asarray(values, np.float32).reshape(column) for values in (spec.mean, spec.std))
    normal = rng.standard_normal((count, *spec.shape), dtype=np.float32)
    return np.asarray((normal * std + mean) / np.float32(spec.scale), np.float32)


def rounding_noise(path: Path, images: npt.NDArray[Any]) -> float:
    """How far the logits of an ONNX classifier move if every input moves by its last bit, up or down at random.

    Two right ways of computing the same logits differ by about as much: 0.8 to 1.5 times on ResNets and MobileNetV2.
    0 for inputs that are integers, which have no such bit.
    """
    if images.dtype.kind != "f":
        return 0.0
    step = np.finfo(images.dtype).eps * np.random.default_rng(0).choice((-1, 1), images.shape)
    moved = (images * (1 + step)).astype(images.dtype)
    return float(np.max(np.abs(run_onnx(path, moved).astype(np.float64) - run_onnx(path, images))))


def run_onnx(path: Path, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The output of an ONNX network, such as (N, classes); several side by side, (N, all of them)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return joined(session.run(None, {session.get_inputs()[0].name: images}))
