"""A tiny artifact of the engine ``onnxruntime`` whose step graphs, gradients included, are written by hand::

    mean over the image - hidden (1x1 convolution, adapter) - bn - tanh - fc

Independent of ``lorac_exporters`` on purpose. Trained: hidden.lora_b, fc.weight, fc.bias, and lora_a where asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hand_steps import FROZEN, GRAPHS, HIDDEN, RANK, SCALE, StepRecipe, Steps, base_model, statistics_model
from onnx import TensorProto
from safetensors.numpy import save_file
from tiny_network import CLASSES, EPS, Arrays, C, Graph, H, W

from lorac_runtime import manifest as mf
from lorac_runtime.engines import Engine, open_engine

FIELDS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class StepArtifact:
    """An artifact on disk and the numbers it was made of; ``start`` is its whole state."""

    folder: Path
    manifest: mf.Manifest
    recipe: StepRecipe
    frozen: Arrays
    start: Arrays


Make = Callable[..., StepArtifact]


def logits(values: dict[str, torch.Tensor], x: np.ndarray, bn: str) -> torch.Tensor:
    """The network in PyTorch, float64; ``bn``: "folded", "train" (moves the running statistics) or "eval"."""
    weight = values["hidden.weight"].reshape(HIDDEN, C) + SCALE * values["hidden.lora_b"] @ values["hidden.lora_a"]
    z = torch.from_numpy(x).double().mean((2, 3)) @ weight.T + values["hidden.bias"]
    if bn != "folded":
        tensors = [values[f"bn.{field}"] for field in ("running_mean", "running_var", "weight", "bias")]
        z = torch.nn.functional.batch_norm(z, *tensors, training=bn == "train", momentum=0.1, eps=EPS)
    return torch.tanh(z) @ values["fc.weight"].T + values["fc.bias"]


def tensors(artifact: StepArtifact, **changed: np.ndarray) -> dict[str, torch.Tensor]:
    """Every tensor of the network as float64, the trained ones requiring a gradient."""
    trained = {t.name for t in artifact.manifest.trainables}
    found = {n: torch.from_numpy(v).double().clone() for n, v in (artifact.frozen | artifact.start | changed).items()}
    return {n: v.requires_grad_(n in trained) for n, v in found.items()}


def numbers(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    found = {
        "hidden.weight": rng.normal(0, 1, (HIDDEN, C, 1, 1)),
        "hidden.bias": rng.normal(0, 0.3, HIDDEN),
        "hidden.lora_a": rng.normal(0, 0.5, (RANK, C)),
        "hidden.lora_b": rng.normal(0, 0.5, (HIDDEN, RANK)),
        "fc.weight": rng.normal(0, 1, (CLASSES, HIDDEN)),
        "fc.bias": rng.normal(0, 0.3, CLASSES),
        "bn.weight": rng.uniform(0.5, 1.5, HIDDEN),
        "bn.bias": rng.normal(0, 0.3, HIDDEN),
        "bn.running_mean": rng.normal(0, 0.2, HIDDEN),
        "bn.running_var": rng.uniform(0.5, 2.0, HIDDEN),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def folded(values: Arrays) -> Arrays:
    """hidden.weight and hidden.bias with bn in them."""
    g = values["bn.weight"].astype(np.float64) / np.sqrt(values["bn.running_var"].astype(np.float64) + EPS)
    bias = (values["hidden.bias"] - values["bn.running_mean"]) * g + values["bn.bias"]
    weight = values["hidden.weight"] * g[:, None, None, None]
    return {"hidden.weight": weight.astype(np.float32), "hidden.bias": bias.astype(np.float32)}


def outside(name: str, value: np.ndarray, path: Path) -> TensorProto:
    """A tensor of a graph whose bytes lie in another file."""
    content, raw = path.read_bytes(), value.tobytes()
    assert content.count(raw) == 1
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", path.name), ("offset", content.index(raw)), ("length", len(raw))):
        proto.external_data.add(key=key, value=str(text))
    return proto


def build_steps(folder: Path, recipe: StepRecipe | None = None) -> StepArtifact:
    """Write a whole artifact into ``folder``."""
    recipe = recipe or StepRecipe()
    folder.mkdir(parents=True)
    unfolded = numbers(recipe.seed)
    base = unfolded | folded(unfolded)
    onnx.save(base_model(base), folder / "base.onnx")
    source = folder / "base.onnx"
    live = recipe.bn_policy == "batch"
    frozen = {n: (unfolded if live else base)[n] for n in (*FROZEN, *(("bn.weight", "bn.bias") if live else ()))}
    if live:
        source = folder / "weights.bin"
        source.write_bytes(b"".join(value.tobytes() for value in frozen.values()))
    trained = ["hidden.lora_b", *([] if recipe.freeze_a else ["hidden.lora_a"]), "fc.weight", "fc.bias"]
    _write_graphs(folder, recipe, {n: outside(n, v, source) for n, v in frozen.items()}, unfolded, trained)
    if recipe.bn_policy == "recalibrate":
        onnx.save(statistics_model(unfolded), folder / "stats_model.onnx")
    norms = {f"bn.{x}": unfolded[f"bn.{x}"] for x in FIELDS}
    save_file(norms | {"bn.conv_bias": unfolded["hidden.bias"]}, folder / "batchnorm.safetensors")
    start = {n: unfolded[n] for n in (*trained, *(["hidden.lora_a"] if recipe.freeze_a else []))}
    moving = {} if recipe.bn_policy == "frozen" else {n: unfolded[n] for n in ("bn.running_mean", "bn.running_var")}
    save_file(start | moving, folder / "adapter.safetensors", metadata=_metadata(folder, recipe))
    manifest = _manifest(folder, recipe, trained, base)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    state = start | ({} if recipe.bn_policy == "frozen" else norms)
    return StepArtifact(folder, manifest, recipe, frozen, state)


def _write_graphs(
    folder: Path, recipe: StepRecipe, frozen: dict[str, TensorProto], values: Arrays, trained: list[str]
) -> None:
    groups = [["fc.weight", "hidden.lora_b"], [n for n in trained if n not in ("fc.weight", "hidden.lora_b")]]
    running = ["bn.running_mean", "bn.running_var"] if recipe.bn_policy == "batch" else []
    for name, write in GRAPHS.items():
        if name == "gradient_step" and recipe.bn_policy == "batch":
            continue
        names = trained if name == "optimizer_step" else [*trained, *running]
        make = Steps(recipe, frozen, {n: values[n].shape for n in names})
        write(make, values["hidden.lora_a"] if recipe.freeze_a else None, groups)
        metadata = {} if name == "eval_step" else {"lorac.groups": json.dumps(groups)}
        model = make.model(metadata | ({"lorac.optimizer": recipe.optimizer} if metadata else {}))
        onnx.save(model, folder / f"{name}.onnx")


def _metadata(folder: Path, recipe: StepRecipe) -> dict[str, str]:
    return {
        "format": "lorac-adapter",
        "schema": "1",
        "model": "step",
        "method": "lora-c",
        "layout": "spatial",
        "r": str(RANK),
        "rank_mode": "rk",
        "alpha": str(SCALE * RANK),
        "bn_policy": recipe.bn_policy,
        "coordinates": "unfolded" if recipe.bn_policy == "batch" else "folded",
        "base_sha256": hashlib.sha256((folder / "base.onnx").read_bytes()).hexdigest(),
        "producer": "tests",
    }


def _manifest(folder: Path, recipe: StepRecipe, trained: list[str], base: Arrays) -> mf.Manifest:
    content, values = (folder / "base.onnx").read_bytes(), numbers(0)
    files = {p.name: mf.FileEntry(mf.sha256(p), p.stat().st_size) for p in sorted(folder.iterdir())}
    entry = mf.EngineEntry(tuple(n for n in files if n.endswith(("_step.onnx", ".bin", "stats_model.onnx"))), "1")
    patched = [n for n in base if not n.startswith("bn.") and "lora" not in n]
    adapter = mf.Adapter(
        layer="hidden",
        weight="hidden.weight",
        lora_a="hidden.lora_a",
        lora_b="hidden.lora_b",
        weight_shape=(HIDDEN, C, 1, 1),
        groups=1,
        r=RANK,
        rank=RANK,
        alpha=SCALE * RANK,
        layout="spatial",
    )
    norm = mf.BatchNorm("bn", *(f"bn.{x}" for x in FIELDS), EPS, 0.1, 1, FROZEN)
    training = mf.TrainingDefaults(
        optimizer=recipe.optimizer,
        clip_norm=recipe.clip_norm,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        amsgrad=recipe.amsgrad,
        loss=recipe.loss,
        epochs=3,
        batch_size=8,
    )
    return mf.Manifest(
        schema_version=mf.SCHEMA_VERSION,
        model="step",
        method="lora-c",
        bn_policy=recipe.bn_policy,
        coordinates="unfolded" if recipe.bn_policy == "batch" else "folded",
        input=mf.InputSpec("input", (C, H, W), 1 / 255, (0.5,) * C, (1.0,) * C),
        output=mf.OutputSpec("logits", CLASSES),
        class_names=tuple(f"class {i}" for i in range(CLASSES)),
        adapters=(adapter,),
        trainables=tuple(mf.Trainable(n, values[n].shape, n.split(".")[1]) for n in trained),
        batchnorms=(norm,),
        training=training,
        files=files,
        patches=tuple(_patch(content, n, base[n]) for n in patched),
        tolerances={"logits": 1e-4},
        engines={"onnxruntime": entry},
        model_parameters=sum(v.size for n, v in values.items() if "lora" not in n),
        versions={"tests": "1"},
    )


def _patch(content: bytes, name: str, value: np.ndarray) -> mf.Patch:
    raw = value.tobytes()
    assert content.count(raw) == 1
    return mf.Patch(name, "base.onnx", content.index(raw), len(raw), "float32", value.shape)


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by recipe, each built once."""
    built: dict[StepRecipe, StepArtifact] = {}

    def get(**recipe: object) -> StepArtifact:
        key = StepRecipe(**recipe)
        if key not in built:
            built[key] = build_steps(tmp_path_factory.mktemp("steps") / "a", key)
        return built[key]

    return get


def opened(artifact: StepArtifact, **options: object) -> Engine:
    return open_engine(artifact.folder, artifact.manifest, engine="onnxruntime", threads=1, **options)


def add_training_files(artifact: StepArtifact) -> StepArtifact:
    """The same artifact with files of the engine onnxruntime-training too, from that library's own generator."""
    from artifacts import ENGINE_FILES, _generate
    from tiny_network import Recipe

    g, values, folder = Graph(), artifact.frozen | artifact.start, artifact.folder
    g.values.update(values)
    x = g.add("Flatten", [g.add("GlobalAveragePool", ["input"], "pooled")], "x")
    change = g.add("MatMul", ["hidden.lora_b", "hidden.lora_a"], "product")
    scaled = g.add("Mul", [change, g.const("scale", np.array(SCALE, np.float32))], "scaled")
    flat = g.add("Reshape", ["hidden.weight", g.const("shape", np.array([HIDDEN, C], np.int64))], "flat")
    weight = g.add("Add", [flat, scaled], "whole")
    z = g.add("Gemm", [x, weight, "hidden.bias"], "z", transB=1)
    g.add("Gemm", [g.add("Tanh", [z], "h"), "fc.weight", "fc.bias"], "logits", transB=1)
    recipe = Recipe(optimizer=artifact.recipe.optimizer, clip_norm=artifact.recipe.clip_norm)
    trained = [t.name for t in artifact.manifest.trainables]
    _generate(g.model({"logits": ["batch", CLASSES]}), folder, trained, recipe)
    files = {n: mf.FileEntry(mf.sha256(folder / n), (folder / n).stat().st_size) for n in ENGINE_FILES}
    engines = artifact.manifest.engines | {"onnxruntime-training": mf.EngineEntry(ENGINE_FILES, "1.19.2")}
    manifest = dataclasses.replace(artifact.manifest, files=artifact.manifest.files | files, engines=engines)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return dataclasses.replace(artifact, manifest=manifest)
