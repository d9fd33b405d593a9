"""A tiny artifact of the engine ``onnxruntime`` whose step graphs, gradients included, are written by hand::

    mean over the image - hidden (1x1 convolution, adapter) - bn - tanh - fc

Independent of ``lorac_exporters`` on purpose. Trained: hidden.lora_b, fc.weight, fc.bias, and lora_a where asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tiny_network import CLASSES, EPS, Arrays, C, Graph, H, W

from lorac_runtime import manifest as mf

HIDDEN, RANK, SCALE = 6, 2, 2.0
FIELDS = ("weight", "bias", "running_mean", "running_var")
FROZEN = ("hidden.weight", "hidden.bias")
BETAS = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class StepRecipe:
    """What to build. The groups of the packed vectors are in another order than the manifest's, on purpose."""

    bn_policy: str = "frozen"
    optimizer: str = "adamw"
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    amsgrad: bool = False
    freeze_a: bool = True
    loss: str = "cross_entropy"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class StepArtifact:
    """An artifact on disk and the numbers it was made of; ``start`` is its whole state."""

    folder: Path
    manifest: mf.Manifest
    recipe: StepRecipe
    frozen: Arrays
    start: Arrays


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


class Steps:
    """Writes one step graph: nodes, typed inputs, outputs, and weights that lie in another file."""

    def __init__(self, recipe: StepRecipe, frozen: dict[str, TensorProto], shapes: dict[str, tuple[int, ...]]) -> None:
        self.graph, self.recipe, self.frozen, self.shapes = Graph(), recipe, frozen, shapes
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0

    def op(self, op: str, *inputs: str | float, **attributes: object) -> str:
        self.count += 1
        names = [self.const(i) if isinstance(i, float) else i for i in inputs]
        return self.graph.add(op, names, f"{op.lower()}_{self.count}", **attributes)

    def const(self, value: object, dtype: type = np.float32) -> str:
        self.count += 1
        return self.graph.const(f"const_{self.count}", np.array(value, dtype))

    def input(self, name: str, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, kind, shape)
        return name

    def output(self, name: str, value: str, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> None:
        self.graph.add("Identity", [value], name)
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        used = {i for node in self.graph.nodes for i in node.input}
        inline = [numpy_helper.from_array(v, k) for k, v in self.graph.values.items()]
        outside = [proto for name, proto in self.frozen.items() if name in used]
        graph = helper.make_graph(
            self.graph.nodes, "step", list(self.inputs.values()), self.outputs, [*inline, *outside]
        )
        model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
        helper.set_model_props(model, metadata)
        return model

    def forward(self, lora_a: np.ndarray | None, *, training: bool) -> dict[str, str]:
        """Everything up to the loss; returns the names of values that the gradient needs."""
        op, v = self.op, {}
        image, labels = self.input("input", ("batch", C, H, W)), self.input("labels", ("batch",), TensorProto.INT64)
        for name, shape in self.shapes.items():
            self.input(name, shape)
        v["a"] = "hidden.lora_a" if lora_a is None else self.const(lora_a)
        v["x"] = op("Flatten", op("GlobalAveragePool", image))
        change = op("Mul", op("MatMul", "hidden.lora_b", v["a"]), SCALE)
        weight = op("Add", op("Reshape", "hidden.weight", self.const([HIDDEN, C], np.int64)), change)
        y = op("Add", op("MatMul", v["x"], op("Transpose", weight)), "hidden.bias")
        v["n"] = op("Cast", op("Shape", labels), to=TensorProto.FLOAT)
        if self.recipe.bn_policy == "batch":
            y = self._normalised(y, v, training=training)
        v["h"] = op("Tanh", y)
        v["logits"] = op("Gemm", v["h"], "fc.weight", "fc.bias", transB=1)
        v["log_p"] = op("LogSoftmax", v["logits"], axis=1)
        v["hot"] = op("OneHot", labels, self.const([CLASSES], np.int64), self.const([0, 1]))
        rows = op("ReduceSum", op("Mul", v["log_p"], v["hot"]), self.const([1], np.int64), keepdims=0)
        v["loss"] = op("Neg", op("ReduceMean", rows, keepdims=0))
        return v

    def _normalised(self, z: str, v: dict[str, str], *, training: bool) -> str:
        op, axis = self.op, self.const([0], np.int64)
        v["mean"], v["var"] = "bn.running_mean", "bn.running_var"
        if training:
            v["mean"] = op("ReduceMean", z, axis, keepdims=0)
            centred = op("Sub", z, v["mean"])
            v["var"] = op("ReduceMean", op("Mul", centred, centred), axis, keepdims=0)
        v["sigma"] = op("Sqrt", op("Add", v["var"], EPS))
        v["unit"] = op("Div", op("Sub", z, v["mean"]), v["sigma"])
        return op("Add", op("Mul", v["unit"], "bn.weight"), "bn.bias")

    def gradients(self, v: dict[str, str]) -> dict[str, str]:
        """By the chain rule, on paper."""
        op, axis = self.op, self.const([0], np.int64)
        d_logits = op("Div", op("Sub", op("Exp", v["log_p"]), v["hot"]), v["n"])
        found = {"fc.weight": op("Gemm", d_logits, v["h"], transA=1)}
        found["fc.bias"] = op("ReduceSum", d_logits, axis, keepdims=0)
        d_h = op("MatMul", d_logits, "fc.weight")
        d_y = op("Sub", d_h, op("Mul", d_h, op("Mul", v["h"], v["h"])))
        if self.recipe.bn_policy == "batch":
            d_unit = op("Mul", d_y, "bn.weight")
            along = op("ReduceMean", op("Mul", d_unit, v["unit"]), axis, keepdims=0)
            level = op("Sub", d_unit, op("ReduceMean", d_unit, axis, keepdims=0))
            d_y = op("Div", op("Sub", level, op("Mul", v["unit"], along)), v["sigma"])
        d_weight = op("Mul", op("Gemm", d_y, v["x"], transA=1), SCALE)
        found["hidden.lora_b"] = op("Gemm", d_weight, v["a"], transB=1)
        if not self.recipe.freeze_a:
            found["hidden.lora_a"] = op("Gemm", "hidden.lora_b", d_weight, transA=1)
        return found

    def packed(self, values: dict[str, str], groups: list[list[str]]) -> list[str]:
        flat = self.const([-1], np.int64)
        return [self.op("Concat", *(self.op("Reshape", values[n], flat) for n in group), axis=0) for group in groups]

    def sizes(self, groups: list[list[str]]) -> list[int]:
        return [sum(math.prod(self.shapes[n]) for n in group) for group in groups]

    def update(self, gradients: list[str], groups: list[list[str]]) -> None:
        """Clipping, and AdamW or SGD as PyTorch documents them; all outputs of it."""
        op, recipe = self.op, self.recipe
        lr, step = self.input("lr", ()), self.input("step", (), TensorProto.INT64)
        squares = [op("ReduceSum", op("Mul", g, g), keepdims=0) for g in gradients]
        norm = op("Sqrt", op("Sum", *squares))
        self.output("gradient_norm", norm, ())
        if recipe.clip_norm:
            factor = op("Min", op("Div", recipe.clip_norm, op("Add", norm, 1e-6)), 1.0)
            gradients = [op("Mul", g, factor) for g in gradients]
        count = op("Add", step, self.const(1, np.int64))
        self.output("step.next", count, (), TensorProto.INT64)
        parameters = self.packed({n: n for n in self.shapes}, groups)
        for k, (p, g, size) in enumerate(zip(parameters, gradients, self.sizes(groups), strict=True)):
            write = self._adamw if recipe.optimizer == "adamw" else self._sgd
            self._unpack(write(k, p, g, size, lr, count), groups[k])

    def _state(self, slot: str, k: int, size: int) -> str:
        return self.input(f"{slot}.{k}", (size,))

    def _adamw(self, k: int, p: str, g: str, size: int, lr: str, count: str) -> str:
        op, double = self.op, TensorProto.DOUBLE
        steps = op("Cast", count, to=double)
        first, second = (
            op("Cast", op("Sub", self.const(1, np.float64), op("Pow", self.const(b, np.float64), steps)), to=1)
            for b in BETAS
        )
        m, v = self._state("exp_avg", k, size), self._state("exp_avg_sq", k, size)
        m = op("Add", op("Mul", m, BETAS[0]), op("Mul", g, 1 - BETAS[0]))
        v = op("Add", op("Mul", v, BETAS[1]), op("Mul", op("Mul", g, g), 1 - BETAS[1]))
        self.output(f"exp_avg.{k}.next", m, (size,))
        self.output(f"exp_avg_sq.{k}.next", v, (size,))
        if self.recipe.amsgrad:
            v = op("Max", v, self._state("max_exp_avg_sq", k, size))
            self.output(f"max_exp_avg_sq.{k}.next", v, (size,))
        spread = op("Add", op("Sqrt", op("Div", v, second)), 1e-8)
        kept = op("Sub", p, op("Mul", p, op("Mul", lr, self.recipe.weight_decay)))
        return op("Sub", kept, op("Mul", lr, op("Div", op("Div", m, first), spread)))

    def _sgd(self, k: int, p: str, g: str, size: int, lr: str, count: str) -> str:
        op = self.op
        if self.recipe.momentum:
            g = op("Add", op("Mul", self._state("momentum", k, size), self.recipe.momentum), g)
            self.output(f"momentum.{k}.next", g, (size,))
        return op("Sub", p, op("Mul", lr, g))

    def _unpack(self, vector: str, group: list[str]) -> None:
        start = 0
        for name in group:
            end = start + math.prod(self.shapes[name])
            part = self.op("Slice", vector, self.const([start], np.int64), self.const([end], np.int64))
            shape = self.const(list(self.shapes[name]), np.int64)
            self.output(f"{name}.next", self.op("Reshape", part, shape), self.shapes[name])
            start = end

    def moved_statistics(self, v: dict[str, str]) -> None:
        op = self.op
        unbiased = op("Mul", v["var"], op("Div", v["n"], op("Sub", v["n"], 1.0)))
        for name, seen in (("bn.running_mean", v["mean"]), ("bn.running_var", unbiased)):
            moved = op("Add", op("Mul", name, 0.9), op("Mul", seen, 0.1))
            self.output(f"{name}.next", moved, (HIDDEN,))


def train_step(make: Steps, lora_a: np.ndarray | None, groups: list[list[str]]) -> None:
    values = make.forward(lora_a, training=True)
    make.output("loss", values["loss"], ())
    make.update(make.packed(make.gradients(values), groups), groups)
    if make.recipe.bn_policy == "batch":
        make.moved_statistics(values)


def gradient_step(make: Steps, lora_a: np.ndarray | None, groups: list[list[str]]) -> None:
    values = make.forward(lora_a, training=True)
    make.output("loss", values["loss"], ())
    weight = make.input("weight", ())
    for k, (g, size) in enumerate(zip(make.packed(make.gradients(values), groups), make.sizes(groups), strict=True)):
        before = make.input(f"gradient.{k}", (size,))
        make.output(f"gradient.{k}.next", make.op("Add", before, make.op("Mul", g, weight)), (size,))


def optimizer_step(make: Steps, lora_a: np.ndarray | None, groups: list[list[str]]) -> None:
    for name, shape in make.shapes.items():
        make.input(name, shape)
    make.update([make.input(f"gradient.{k}", (size,)) for k, size in enumerate(make.sizes(groups))], groups)


def eval_step(make: Steps, lora_a: np.ndarray | None, groups: list[list[str]]) -> None:
    values = make.forward(lora_a, training=False)
    make.output("loss", values["loss"], ())
    make.output("logits", values["logits"], ("batch", CLASSES))


GRAPHS = {f.__name__: f for f in (train_step, gradient_step, optimizer_step, eval_step)}


def base_model(values: Arrays) -> onnx.ModelProto:
    g = Graph()
    g.values.update({n: values[n] for n in (*FROZEN, "fc.weight", "fc.bias")})
    hidden = g.add("Conv", [g.add("GlobalAveragePool", ["input"], "pooled"), *FROZEN], "hidden")
    g.add(
        "Gemm", [g.add("Flatten", [g.add("Tanh", [hidden], "h")], "flat"), "fc.weight", "fc.bias"], "logits", transB=1
    )
    return g.model({"logits": ["batch", CLASSES]})


def statistics_model(values: Arrays) -> onnx.ModelProto:
    g, outputs = Graph(), {"bn.batch_mean": ["C"], "bn.batch_var": ["C"]}
    g.values.update({n: values[n] for n in FROZEN})
    z = g.add("Flatten", [g.add("Conv", [g.add("GlobalAveragePool", ["input"], "pooled"), *FROZEN], "hidden")], "z")
    axis = g.const("axis", np.array([0], np.int64))
    mean = g.add("ReduceMean", [z, axis], "bn.batch_mean", keepdims=0)
    square = g.add("Mul", [g.add("Sub", [z, mean], "centred"), "centred"], "square")
    g.add("ReduceMean", [square, axis], "bn.batch_var", keepdims=0)
    return g.model(outputs)


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
