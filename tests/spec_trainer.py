"""A trainer of training artifacts, written from sections 4 and 10 of docs/specification.md alone, with onnxruntime."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from spec_reader import Artifact, Json, Tensors


def rate(training: Json, step: int, steps: int) -> float:
    """The learning rate of a step, from 0."""
    w = round(training["warmup"] * steps)
    if step < w:
        return float(training["lr"] * (step + 1) / w)
    return float(training["lr"] / 2 * (1 + math.cos(math.pi * (step - w + 1) / (steps - w + 1))))


def normalised(spec: Json, raw: np.ndarray) -> np.ndarray:
    """What the network takes for raw images (batch, height, width, channels)."""
    mean, std = (np.array(spec[k], np.float32) for k in ("mean", "std"))
    value = (raw.astype(np.float32) * np.float32(spec["scale"]) - mean) / std
    return np.ascontiguousarray(value.transpose(0, 3, 1, 2))


def session(artifact: Artifact, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(artifact.folder / name), options)


def memory(metadata: dict[str, str], training: Json, sizes: dict[str, int]) -> Tensors:
    """Zeros for every packed vector."""
    prefixes = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if training["amsgrad"] else [])
    if metadata["lorac.optimizer"] == "sgd":
        prefixes = ["momentum"] if training["momentum"] else []
    groups = [sum(sizes[n] for n in names) for names in json.loads(metadata["lorac.groups"])]
    return {f"{p}.{k}": np.zeros(size, np.float32) for p in prefixes for k, size in enumerate(groups)}


def trained(artifact: Artifact, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensors, list[float]]:
    """(state, losses) after a step on each batch of normalised images and labels."""
    m = artifact.manifest
    front = session(artifact, "prefix_step.onnx") if m["features"] else None
    steps = session(artifact, "train_step.onnx")
    sizes = {t["name"]: math.prod(t["shape"]) for t in m["trainables"]}
    inputs = {i.name for i in steps.get_inputs()}
    known = artifact.norms | artifact.state
    carried = {n: v for n, v in known.items() if n in inputs}
    carried |= memory(steps.get_modelmeta().custom_metadata_map, m["training"], sizes) | {"step": np.array(0, np.int64)}
    outputs, losses = [o.name for o in steps.get_outputs()], []
    for at, (x, labels) in enumerate(batches):
        data = {m["input"]["name"]: x}
        if front is not None:
            each = [front.run(None, {m["input"]["name"]: x[i : i + 1]}) for i in range(len(x))]
            data = {
                o.name: np.concatenate(v) for o, v in zip(front.get_outputs(), zip(*each, strict=True), strict=True)
            }
        feeds = data | carried | {"labels": labels, "lr": np.array(rate(m["training"], at, len(batches)), np.float32)}
        found = dict(zip(outputs, steps.run(outputs, {n: v for n, v in feeds.items() if n in inputs}), strict=True))
        losses.append(float(found["loss"]))
        carried = {n: found[f"{n}.next"] for n in carried}
    return artifact.state | {n: v for n, v in carried.items() if n in artifact.state}, losses
