"""A small random ONNX graph in the making: draws, constants, nodes, and the shapes of its values without the batch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Attribute = int | float | str | list[int]


@dataclasses.dataclass(frozen=True)
class Value:
    """A computed value; ``shape`` leaves out the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[0]


class Graph:
    """Collects nodes. ``kinds`` counts what occurred: operators, and forms of them that are worth a look."""

    def __init__(self, seed: int, *shape: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.kinds: Counter[str] = Counter()
        self.input = Value("input", shape)
        self.images: list[Value] = []  # feature maps so far, for branches

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def constant(self, content: Any, dtype: type = np.int64) -> str:
        """An initializer of small integers, or of float32 numbers."""
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(content, dtype)
        return name

    def floats(self, content: Any) -> str:
        return self.constant(content, np.float32)

    def noise(self, *shape: int, size: float = 1.0, mean: float = 0.0) -> str:
        return self.floats(mean + size * self.rng.standard_normal(shape))

    def weight(self, *shape: int, fan_in: int) -> str:
        """Numbers that keep the size of what they are multiplied with."""
        return self.noise(*shape, size=math.sqrt(1.5 / fan_in))

    def add(
        self,
        op: str,
        inputs: Sequence[Value | str],
        shape: Sequence[int],
        *,
        form: str = "",
        **attributes: Attribute,
    ) -> Value:
        """A node with one output of this shape."""
        return self.split(op, inputs, [shape], form=form, **attributes)[0]

    def split(
        self,
        op: str,
        inputs: Sequence[Value | str],
        shapes: Sequence[Sequence[int]],
        *,
        form: str = "",
        **attributes: Attribute,
    ) -> list[Value]:
        """A node with an output of each of these shapes."""
        position = len(self.nodes)
        outputs = [Value(f"v{position}_{i}", tuple(shape)) for i, shape in enumerate(shapes)]
        names = [value if isinstance(value, str) else value.name for value in inputs]
        outs = [value.name for value in outputs]
        self.nodes.append(helper.make_node(op, names, outs, name=f"n{position}", **attributes))
        self.note(op, *([f"{op} {form}"] if form else []))
        return outputs

    def note(self, *kinds: str) -> None:
        self.kinds.update(kinds)

    def model(self, output: Value) -> onnx.ModelProto:
        """Nodes that the output does not need are left out."""
        nodes = self._needed(output.name)
        used = {name for node in nodes for name in node.input}
        weights = [numpy_helper.from_array(v, k) for k, v in self.weights.items() if k in used]
        graph = helper.make_graph(
            nodes,
            "random",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.input.shape])],
            [helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", *output.shape])],
            weights,
        )
        return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])

    def _needed(self, output: str) -> list[onnx.NodeProto]:
        wanted, kept = {output}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= set(node.input)
        return kept[::-1]
