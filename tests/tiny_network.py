"""A tiny network in ONNX: its numbers, its folding, its graph in every form a training artifact needs::

    conv1 - bn1 - act - conv2 (stride 2) - bn2 - act -+- bn3 - act - conv3 -+- mean - fc
                                                      +---------------------+

bn1 and bn2 fold into the convolution before them, bn3 cannot and becomes Mul + Add. Trained: conv1.weight,
adapters of conv2 and conv3, fc.weight and fc.bias.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray]
C, H, W, CLASSES, RANK, R, ALPHA, EPS = 3, 8, 8, 3, 6, 2, 4.0, 1e-5
CONVS = {"conv1": ((6, C, 3, 3), 1), "conv2": ((8, 6, 3, 3), 2), "conv3": ((8, 8, 3, 3), 1)}
BNS = {"bn1": ("conv1", 6, 64), "bn2": ("conv2", 8, 16), "bn3": (None, 8, 16)}
BN_FIELDS = ("weight", "bias", "running_mean", "running_var")
ADAPTED = ("conv2", "conv3")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to build. ``lora_b`` scales the starting lora_b: 0 gives an adapter that changes nothing."""

    bn_policy: str = "frozen"
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    activation: str = "Relu"
    lora_b: float = 0.0
    in_graph: bool = False
    seed: int = 0
    momentum: float = 0.1
    epochs: int = 3
    batch_size: int = 8


def numbers(seed: int) -> Arrays:
    """Random weights of the unfolded network."""
    rng = np.random.default_rng(seed)
    values: Arrays = {}
    for name, (shape, _) in CONVS.items():
        values[f"{name}.weight"] = rng.normal(0, 1 / math.sqrt(math.prod(shape[1:])), shape)
        values[f"{name}.bias"] = rng.normal(0, 0.1, shape[0])
    for name, (_, channels, _) in BNS.items():
        values[f"{name}.weight"] = rng.uniform(0.5, 1.5, channels)
        values[f"{name}.bias"] = rng.normal(0, 0.2, channels)
        values[f"{name}.running_mean"] = rng.normal(0, 0.2, channels)
        values[f"{name}.running_var"] = rng.uniform(0.5, 2.0, channels)
    values["fc.weight"] = rng.normal(0, 0.3, (CLASSES, 8))
    values["fc.bias"] = rng.normal(0, 0.1, CLASSES)
    return {k: v.astype(np.float32) for k, v in values.items()}


def fold(u: Arrays) -> Arrays:
    """The folded network's tensors: the formula of batch normalisation in evaluation mode, in float64."""
    f = {k: v.astype(np.float64) for k, v in u.items()}
    for bn, (conv, _, _) in BNS.items():
        g = f[f"{bn}.weight"] / np.sqrt(f[f"{bn}.running_var"] + EPS)
        shift = f[f"{bn}.bias"] - f[f"{bn}.running_mean"] * g
        if conv is None:
            f[f"{bn}.weight"], f[f"{bn}.bias"] = g.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
        else:
            f[f"{conv}.weight"] = f[f"{conv}.weight"] * g[:, None, None, None]
            f[f"{conv}.bias"] = f[f"{conv}.bias"] * g + shift
    absorbed = [f"{bn}.{x}" for bn, (conv, _, _) in BNS.items() for x in BN_FIELDS if conv]
    gone = {*absorbed, "bn3.running_mean", "bn3.running_var"}
    return {k: v.astype(np.float32) for k, v in f.items() if k not in gone}


def adapter_values(seed: int, lora_b: float) -> Arrays:
    """Random lora_a and lora_b of conv2 and conv3."""
    rng = np.random.default_rng(seed + 1)
    values: Arrays = {}
    for name in ADAPTED:
        c_out, c_in, k_h, k_w = CONVS[name][0]
        bound = 1 / math.sqrt(c_in * k_w)
        values[f"{name}.lora_a"] = rng.uniform(-bound, bound, (RANK, c_in * k_w)).astype(np.float32)
        values[f"{name}.lora_b"] = (lora_b * rng.normal(0, 0.2, (c_out * k_h, RANK))).astype(np.float32)
    return values


class Graph:
    """Collects nodes and initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.values: Arrays = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def const(self, name: str, value: np.ndarray) -> str:
        self.values[name] = value
        return name

    def model(self, outputs: dict[str, list[object]], *, in_graph: bool = False) -> onnx.ModelProto:
        shape = ["batch", H, W, C] if in_graph else ["batch", C, H, W]
        kind = TensorProto.UINT8 if in_graph else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("input", kind, shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [numpy_helper.from_array(v, k) for k, v in self.values.items()],
        )
        return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


def network(values: Arrays, recipe: Recipe, *, bn: str, adapters: bool) -> tuple[Graph, list[str]]:
    """``bn``: "folded", "eval", "train" (BatchNormalization nodes) or "stats" (primitives, batch statistics).

    Returns the graph and the names of extra outputs.
    """
    g, extra, act = Graph(), [], recipe.activation
    g.values.update(values if bn != "stats" else {k: v for k, v in values.items() if "running" not in k})

    def weight(name: str) -> str:
        if not adapters or name not in ADAPTED:
            return f"{name}.weight"
        c_out, c_in, k_h, k_w = CONVS[name][0]
        product = g.add("MatMul", [f"{name}.lora_b", f"{name}.lora_a"], f"{name}_ba")
        split = g.const(f"{name}_split", np.array([c_out, k_h, c_in, k_w], np.int64))
        rows = g.add("Reshape", [product, split], f"{name}_rows")
        arranged = g.add("Transpose", [rows], f"{name}_arranged", perm=[0, 2, 1, 3])
        scale = g.const(f"{name}_scale", np.array(ALPHA / R, np.float32))
        return g.add("Add", [f"{name}.weight", g.add("Mul", [arranged, scale], f"{name}_d")], f"{name}_w")

    def conv(name: str, x: str) -> str:
        stride = CONVS[name][1]
        inputs = [x, weight(name), f"{name}.bias"]
        return g.add("Conv", inputs, name, pads=[1] * 4, strides=[stride] * 2, kernel_shape=[3, 3])

    def norm(name: str, x: str) -> str:
        folded_into = BNS[name][0]
        if bn == "folded":
            if folded_into:
                return x
            return g.add("Add", [g.add("Mul", [x, f"{name}.weight"], f"{name}_m"), f"{name}.bias"], name)
        if bn == "stats":
            return batch_norm(name, x)
        inputs = [x, *(f"{name}.{field}" for field in BN_FIELDS)]
        g.add("BatchNormalization", inputs, name, epsilon=EPS, momentum=1 - recipe.momentum)
        if bn == "train":
            g.nodes[-1].output.extend([f"{name}_mean", f"{name}_var"])
            g.nodes[-1].attribute.append(helper.make_attribute("training_mode", 1))
        return name

    def batch_norm(name: str, x: str) -> str:
        axes = g.const("axes", np.array([0, 2, 3], np.int64))
        mean = g.add("ReduceMean", [x, axes], f"{name}_mean", keepdims=1)
        centred = g.add("Sub", [x, mean], f"{name}_centred")
        square = g.add("Mul", [centred, centred], f"{name}_square")
        var = g.add("ReduceMean", [square, axes], f"{name}_var", keepdims=1)
        for value, what in ((mean, "batch_mean"), (var, "batch_var")):
            extra.append(g.add("Reshape", [value, g.const("flat", np.array([-1], np.int64))], f"{name}.{what}"))
        sigma = g.add("Sqrt", [g.add("Add", [var, g.const("eps", np.float32(EPS))], f"{name}_ve")], f"{name}_s")
        column = g.const("column", np.array([1, -1, 1, 1], np.int64))
        gamma = g.add("Reshape", [f"{name}.weight", column], f"{name}_g")
        beta = g.add("Reshape", [f"{name}.bias", column], f"{name}_b")
        unit = g.add("Div", [centred, sigma], f"{name}_unit")
        return g.add("Add", [g.add("Mul", [unit, gamma], f"{name}_scaled"), beta], name)

    x = "input"
    if recipe.in_graph:
        image = g.add("Cast", [g.add("Transpose", ["input"], "nchw", perm=[0, 3, 1, 2])], "float", to=1)
        scaled = g.add("Mul", [image, g.const("pixel_scale", np.float32(1 / 255))], "scaled")
        x = g.add("Sub", [scaled, g.const("pixel_mean", np.full((1, C, 1, 1), 0.5, np.float32))], "normal")
    x = g.add(act, [norm("bn1", conv("conv1", x))], "act1")
    skip = g.add(act, [norm("bn2", conv("conv2", x))], "act2")
    x = conv("conv3", g.add(act, [norm("bn3", skip)], "act3"))
    x = g.add("GlobalAveragePool", [g.add("Add", [x, skip], "sum")], "pooled")
    g.add("Gemm", [g.add("Flatten", [x], "flat_features"), "fc.weight", "fc.bias"], "logits", transB=1)
    return g, extra
