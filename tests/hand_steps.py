"""Step graphs of the engine ``onnxruntime``, gradients included, written by hand: the network of `step_artifacts`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_network import CLASSES, EPS, Arrays, C, Graph, H, W

HIDDEN, RANK, SCALE = 6, 2, 2.0
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
