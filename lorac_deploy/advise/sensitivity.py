"""Relative gradient norms: which part of a network a drift asks to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from lorac_runtime.adapter import load_adapter
from lorac_runtime.data import LocalData, preprocess
from lorac_runtime.engines import step_graph as sg
from lorac_runtime.manifest import ADAPTER, Manifest, load

Floats = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[Any]]


def relative_gradients(artifact: Path, data: LocalData, *, batches: int = 5, seed: int = 0) -> dict[str, float]:
    """Norm of the gradient over the norm of the tensor, mean over ``batches``, for every tensor that trains.

    Nothing is changed. This is Auto-RGN of surgical fine-tuning (Lee et al., arXiv 2210.11466), before its division
    by the largest.

    Raises ValueError for data without labels.
    """
    if data.labels is None:
        raise ValueError("gradients need labels, and these data have none")
    manifest, state = load(artifact), load_adapter(artifact / ADAPTER).tensors
    sums = dict.fromkeys((t.name for t in manifest.trainables), 0.0)
    found = _gradients(artifact, manifest, state, _batches(data, manifest, batches, seed))
    for gradients in found:
        for name, gradient in gradients.items():
            sums[name] += _norm(gradient) / max(_norm(state[name]), 1e-12)
    return {name: total / batches for name, total in sums.items()}


def block_scores(relative: Mapping[str, float], blocks: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Mean over the weights of each block's layers of their relative gradient, divided by the largest of the blocks.

    >>> block_scores({"a.weight": 1.0, "b.weight": 4.0, "b.bias": 9.0}, {"front": ("a",), "rear": ("b",)})
    {'front': 0.25, 'rear': 1.0}
    """
    found = {
        word: [relative[f"{n}.weight"] for n in names if f"{n}.weight" in relative] for word, names in blocks.items()
    }
    means = {word: math.fsum(values) / len(values) if values else 0.0 for word, values in found.items()}
    largest = max(means.values(), default=0.0)
    return {word: mean / largest if largest else 0.0 for word, mean in means.items()}


def _batches(data: LocalData, manifest: Manifest, count: int, seed: int) -> Iterator[Feeds]:
    size = min(manifest.training.batch_size, len(data))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = rng.choice(len(data), size, replace=False)
        images = preprocess(data.images[chosen], manifest.input)
        assert data.labels is not None
        yield {manifest.input.name: images, sg.LABELS: data.labels[chosen]}


def _gradients(
    artifact: Path,
    manifest: Manifest,
    state: Mapping[str, Floats],
    batches: Iterator[Feeds],
) -> Iterator[dict[str, Floats]]:
    """The gradient of each tensor, batch by batch."""
    path = artifact / sg.GRADIENT
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    layout = sg.read_layout(session, manifest, str(path))
    empty = {n: np.zeros(shape, np.float32) for n, shape in layout.sizes([sg.PACKED_GRADIENT]).items()}
    tensors = {name: state[name] for name in layout.tensors}
    for batch in batches:
        feeds = {**batch, **tensors, **empty, sg.WEIGHT: np.array(1.0, np.float32)}
        packed = session.run([name + sg.NEXT for name in empty], feeds)
        yield {
            n: g for names, vector in zip(layout.groups, packed, strict=True) for n, g in _split(layout, names, vector)
        }


def _split(layout: sg.Layout, names: Sequence[str], vector: Floats) -> Iterator[tuple[str, Floats]]:
    at = 0
    for name in names:
        count = math.prod(layout.tensors[name])
        yield name, vector[at : at + count]
        at += count


def _norm(values: Floats) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))
