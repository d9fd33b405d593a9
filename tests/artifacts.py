"""Tiny training artifacts for tests (see `tiny_network`), made with onnx and onnxruntime's own generator only.

Independent of ``lorac_exporters`` on purpose, so that they can serve as an oracle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file
from tiny_network import (
    ADAPTED,
    ALPHA,
    BN_FIELDS,
    BNS,
    CLASSES,
    CONVS,
    EPS,
    RANK,
    Arrays,
    C,
    H,
    R,
    Recipe,
    W,
    adapter_values,
    fold,
    network,
    numbers,
)

from lorac_runtime.manifest import (
    Adapter,
    BatchNorm,
    EngineEntry,
    FileEntry,
    InputSpec,
    Manifest,
    OutputSpec,
    Patch,
    Trainable,
    TrainingDefaults,
)

ENGINE_FILES = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Tiny:
    """An artifact on disk and the numbers it was made of; ``start`` are the trainables in its coordinates."""

    folder: Path
    manifest: Manifest
    unfolded: Arrays
    folded: Arrays
    start: Arrays


def _generate(model: onnx.ModelProto, folder: Path, trained: list[str], recipe: Recipe) -> None:
    from onnxruntime.training import artifacts, onnxblock

    clip = onnxblock.optim.ClipGradNorm(recipe.clip_norm) if recipe.clip_norm else None
    if recipe.optimizer == "sgd":
        optimizer = onnxblock.optim.SGD(clip_grad=clip)
    else:
        optimizer = onnxblock.optim.AdamW(eps=1e-8, weight_decay=recipe.weight_decay, clip_grad=clip)
    frozen = [i.name for i in model.graph.initializer if "." in i.name and i.name not in trained]
    with _silent():
        artifacts.generate_artifacts(
            model,
            requires_grad=trained,
            frozen_params=frozen,
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=optimizer,
            artifact_directory=str(folder),
            additional_output_names=["logits"],
        )
    for name in ENGINE_FILES[:3]:
        proto = onnx.load(folder / name)
        proto.ir_version = 9
        onnx.save(proto, folder / name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The generator writes hundreds of lines to file descriptor 2, whatever the severity is set to."""
    kept = os.dup(2)
    with open(os.devnull, "w") as sink:  # noqa: PTH123
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _write_engine_files(folder: Path, recipe: Recipe, values: Arrays, trained: list[str]) -> None:
    outputs: dict[str, list[object]] = {"logits": ["batch", CLASSES]}
    if recipe.bn_policy != "batch":
        graph, _ = network(values, recipe, bn="folded", adapters=True)
        _generate(graph.model(outputs, in_graph=recipe.in_graph), folder, trained, recipe)
        return
    graph, _ = network(values, recipe, bn="eval", adapters=True)
    _generate(graph.model(outputs, in_graph=recipe.in_graph), folder, trained, recipe)
    evaluation = (folder / "eval_model.onnx").read_bytes()  # the one of training mode would not load
    graph, _ = network(values, recipe, bn="train", adapters=True)
    _generate(graph.model(outputs, in_graph=recipe.in_graph), folder, trained, recipe)
    (folder / "eval_model.onnx").write_bytes(evaluation)


def build(folder: Path, recipe: Recipe | None = None) -> Tiny:
    """Write a whole artifact into ``folder``."""
    recipe = recipe or Recipe()
    folder.mkdir(parents=True)
    unfolded = numbers(recipe.seed)
    folded = fold(unfolded)
    trained = ["conv1.weight", *(f"{c}.lora_{x}" for c in ADAPTED for x in "ab"), "fc.weight", "fc.bias"]
    training = (unfolded if recipe.bn_policy == "batch" else folded) | adapter_values(recipe.seed, recipe.lora_b)
    start = {name: training[name] for name in trained}
    base, _ = network(folded, recipe, bn="folded", adapters=False)
    onnx.save(base.model({"logits": ["batch", CLASSES]}, in_graph=recipe.in_graph), folder / "base.onnx")
    _write_engine_files(folder, recipe, training, trained)
    save_file(_batchnorm_file(unfolded), folder / "batchnorm.safetensors")
    files = [*ENGINE_FILES]
    if recipe.bn_policy == "recalibrate":
        stats, names = network(unfolded, recipe, bn="stats", adapters=False)
        onnx.save(stats.model({n: ["C"] for n in names}, in_graph=recipe.in_graph), folder / "stats_model.onnx")
        files.append("stats_model.onnx")
    metadata = _adapter_metadata(folder, recipe)
    save_file(start | _statistics(unfolded, recipe), folder / "adapter.safetensors", metadata=metadata)
    manifest = _manifest(folder, recipe, start, folded, tuple(files))
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return Tiny(folder, manifest, unfolded, folded, start)


def _statistics(unfolded: Arrays, recipe: Recipe) -> Arrays:
    if recipe.bn_policy == "frozen":
        return {}
    return {k: v for k, v in unfolded.items() if "running" in k}


def _batchnorm_file(unfolded: Arrays) -> Arrays:
    tensors = {f"{bn}.{x}": unfolded[f"{bn}.{x}"] for bn in BNS for x in BN_FIELDS}
    return tensors | {f"{bn}.conv_bias": unfolded[f"{conv}.bias"] for bn, (conv, _, _) in BNS.items() if conv}


def _adapter_metadata(folder: Path, recipe: Recipe) -> dict[str, str]:
    return {
        "format": "lorac-adapter",
        "schema": "1",
        "model": "tiny",
        "method": "lora-c",
        "layout": "spatial",
        "r": str(R),
        "rank_mode": "rk",
        "alpha": str(ALPHA),
        "bn_policy": recipe.bn_policy,
        "coordinates": _coordinates(recipe),
        "base_sha256": hashlib.sha256((folder / "base.onnx").read_bytes()).hexdigest(),
        "producer": "tests",
    }


def _coordinates(recipe: Recipe) -> str:
    return "unfolded" if recipe.bn_policy == "batch" else "folded"


def _manifest(folder: Path, recipe: Recipe, start: Arrays, folded: Arrays, engine_files: tuple[str, ...]) -> Manifest:
    base = (folder / "base.onnx").read_bytes()
    changing = ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight", "fc.bias"]
    if recipe.bn_policy != "frozen":
        changing = sorted(folded)
    names = ["base.onnx", "adapter.safetensors", "batchnorm.safetensors", *engine_files]
    return Manifest(
        schema_version=1,
        model="tiny",
        method="lora-c",
        bn_policy=recipe.bn_policy,
        coordinates=_coordinates(recipe),
        input=InputSpec("input", (C, H, W), 1 / 255, (0.5,) * C, (1.0,) * C, recipe.in_graph),
        output=OutputSpec("logits", CLASSES),
        class_names=tuple(f"class {i}" for i in range(CLASSES)),
        adapters=tuple(_adapter(name) for name in ADAPTED),
        trainables=tuple(Trainable(k, v.shape, k.rsplit(".", 1)[1]) for k, v in start.items()),
        batchnorms=tuple(_batchnorm(name, recipe.momentum) for name in BNS),
        training=TrainingDefaults(
            optimizer=recipe.optimizer,
            clip_norm=recipe.clip_norm,
            weight_decay=recipe.weight_decay,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
        ),
        files={n: _entry(folder / n) for n in names},
        patches=tuple(_patch(base, name, folded[name]) for name in changing),
        tolerances={"logits": 1e-4},
        engines={"onnxruntime-training": EngineEntry(engine_files, "1.19.2")},
        model_parameters=sum(v.size for v in numbers(0).values()),
        versions={"tests": "1"},
    )


def _adapter(name: str) -> Adapter:
    shape = CONVS[name][0]
    return Adapter(
        layer=name,
        weight=f"{name}.weight",
        lora_a=f"{name}.lora_a",
        lora_b=f"{name}.lora_b",
        weight_shape=shape,
        groups=1,
        r=R,
        rank=RANK,
        alpha=ALPHA,
        layout="spatial",
    )


def _batchnorm(name: str, momentum: float) -> BatchNorm:
    conv, _, positions = BNS[name]
    into = (f"{conv}.weight", f"{conv}.bias") if conv else (f"{name}.weight", f"{name}.bias")
    fields = [f"{name}.{x}" for x in BN_FIELDS]
    return BatchNorm(name, *fields, EPS, momentum, positions, into, affine=conv is None)


def _entry(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


def _patch(base: bytes, name: str, value: np.ndarray) -> Patch:
    raw = value.tobytes()
    assert base.count(raw) == 1, f"{name} must be findable by its bytes"
    return Patch(name, "base.onnx", base.index(raw), len(raw), "float32", value.shape)
