"""Write a few nodes in place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import constant, float_array, need, need_graph, unique_name, value_names

Attribute = int | float | str | Sequence[int]


class Tape:
    """Collects the nodes that will replace ``node``; their names begin with its name."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.graph = need_graph(node)
        self.nodes: list[ir.Node] = []

    @property
    def x(self) -> ir.Value:
        """The first input of the node that is replaced."""
        return need(self.node.inputs[0])

    def op(
        self, op_type: str, *inputs: ir.Value | float, attributes: Mapping[str, Attribute] | None = None
    ) -> ir.Value:
        """Append a node; a number among the inputs becomes a float32 scalar."""
        values = [v if isinstance(v, ir.Value) else self.constant(np.float32(v)) for v in inputs]
        name = f"{self._prefix()}.{op_type.lower()}_{len(self.nodes)}"
        node = ir.node(op_type, values, attributes, name=name)
        node.outputs[0].name = unique_name(name, value_names(self.graph))
        node.outputs[0].type = self.node.outputs[0].type
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, content: npt.ArrayLike) -> ir.Value:
        """A constant: float32 for numbers with a point, int64 for integers; equal scalars are shared."""
        numbers = np.asarray(content)
        if numbers.ndim == 0:
            return self._scalar(float(numbers))
        return constant(self.graph, unique_name(f"{self._prefix()}.constant", value_names(self.graph)), numbers)

    def _scalar(self, number: float) -> ir.Value:
        name = f"scalar_{number!r}"
        known = self.graph.initializers.get(name)
        if known is not None and float_array(known).shape == ():
            return known
        return constant(self.graph, name, np.float32(number))

    def _prefix(self) -> str:
        return self.node.name or str(self.node.outputs[0].name)
