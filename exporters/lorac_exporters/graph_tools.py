"""Small helpers shared by all graph passes; the data structure is `onnx_ir` throughout.

An `onnx_ir` value knows its producer and its uses, so passes edit in place and need no name tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from lorac_runtime.errors import OutputError

Array = npt.NDArray[np.generic]

FILTERS = "lorac.filters"  # metadata: weights of convolutions that are no parameters of the network, a JSON list

# Operators whose second input is a weight and whose third, if any, is a bias.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def constant(graph: ir.Graph, name: str, array: npt.ArrayLike) -> ir.Value:
    """Add an initializer (stored as raw bytes when saved) and return it.

    >>> graph = ir.Graph([], [], nodes=[])
    >>> constant(graph, "fc.bias", np.zeros(10, np.float32)).shape
    Shape([10])

    Raises ValueError if the name is taken.
    """
    if name in value_names(graph):
        raise ValueError(f"a value named {name!r} exists already in graph {graph.name!r}")
    content = np.asarray(array)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(content.dtype)))
    set_array(value, content)
    graph.register_initializer(value)
    return value


def set_array(value: ir.Value, array: Array) -> None:
    """Give an initializer other numbers; its name stays, its shape and dtype follow the array."""
    value.const_value = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def array(value: ir.Value | None) -> Array | None:
    """The numbers of a constant value; None if it is absent or computed.

    >>> array(None) is None
    True
    """
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def float_array(value: ir.Value) -> npt.NDArray[np.float32]:
    """The numbers of a float initializer. Raises ValueError if the value is computed."""
    numbers = array(value)
    if numbers is None:
        raise ValueError(f"{value.name!r} is computed by the graph, expected an initializer")
    return numbers.astype(np.float32, copy=False)


def value_names(graph: ir.Graph) -> set[str]:
    """Names of all inputs, initializers and node outputs."""
    produced = (output.name for node in graph for output in node.outputs)
    inputs = (value.name for value in graph.inputs)
    return {name for name in (*inputs, *graph.initializers, *produced) if name}


def unique_name(wish: str, taken: Iterable[str]) -> str:
    """``wish``, or ``wish_1``, ``wish_2`` ... where that is taken.

    >>> unique_name("fc.bias", {"fc.bias"})
    'fc.bias_1'
    """
    names = set(taken)
    candidates = (f"{wish}_{i}" if i else wish for i in range(len(names) + 1))
    return next(name for name in candidates if name not in names)


def layer_name(weight_name: str) -> str:
    """The layer that a weight belongs to: its name without a trailing ``.weight``.

    >>> layer_name("layer1.0.conv1.weight"), layer_name("onnx::Conv_193")
    ('layer1.0.conv1', 'onnx::Conv_193')
    """
    return weight_name.removesuffix(".weight")


def nodes_of(graph: ir.Graph, *op_types: str) -> list[ir.Node]:
    """Nodes of the named ONNX operators, in the order of the graph (which is topological)."""
    return [node for node in graph if node.domain == "" and node.op_type in op_types]


def convolutions(graph: ir.Graph) -> list[ir.Node]:
    """Conv nodes whose weight is an initializer, in topological order."""
    return [node for node in nodes_of(graph, "Conv") if array(node.inputs[1]) is not None]


def need(value: ir.Value | None) -> ir.Value:
    """A value that the ONNX standard says is there. Raises ValueError if it is absent."""
    if value is None:
        raise ValueError("a required input of a node is missing")
    return value


def name_of(value: ir.Value | None) -> str:
    """The name of a named value. Raises ValueError if it has none."""
    name = need(value).name
    if not name:
        raise ValueError("a value has no name")
    return name


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An optional input: None if it is absent or left out at the end."""
    return node.inputs[index] if index < len(node.inputs) else None


def set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Connect an input, also one that was left out at the end."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default in the ONNX standard."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute as the decimal it was meant to be: float32 0.9 is 0.9, not 0.8999999762.

    >>> float_attribute(ir.node("Elu", [None], {"alpha": float(np.float32(0.1))}), "alpha", 1.0)
    0.1
    """
    attribute = node.attributes.get(name)
    return default if attribute is None else float(str(np.float32(attribute.as_float())))


def ints_attribute(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """A list attribute, or its default."""
    attribute = node.attributes.get(name)
    return tuple(default) if attribute is None else tuple(attribute.as_ints())


def text_attribute(node: ir.Node, name: str, default: str) -> str:
    """A text attribute, or its default in the ONNX standard."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def static_dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Known sizes of a value, None for a symbolic dimension; None if even the rank is unknown.

    >>> static_dims(ir.Value(name="x", shape=ir.Shape(["batch", 3, 8, 8])))
    (None, 3, 8, 8)
    """
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def replace_node(node: ir.Node, new_nodes: Sequence[ir.Node], result: ir.Value) -> None:
    """Put ``new_nodes`` where a one-output node stood; ``result`` takes over its name, uses and shape."""
    graph, old = need_graph(node), node.outputs[0]
    name, shape, kind = old.name, old.shape, old.type
    graph.insert_before(node, list(new_nodes))
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name, result.type, result.shape = name, kind, shape


def bypass(node: ir.Node) -> None:
    """Remove a node that passes its first input on; an output of the graph keeps its name."""
    source, old = need(node.inputs[0]), node.outputs[0]
    was_output = old.is_graph_output()
    old.replace_all_uses_with(source, replace_graph_outputs=True)
    need_graph(node).remove(node, safe=True)
    if was_output:
        source.name = old.name


def producer(value: ir.Value) -> ir.Node:
    """The node that computes a value. Raises ValueError for an input or initializer."""
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name!r} is computed by no node")
    return node


def need_graph(node: ir.Node) -> ir.Graph:
    """The graph that holds a node. Raises ValueError for a loose node or one in a function."""
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{describe(node)} belongs to no graph")
    return node.graph


def is_setting(value: ir.Value) -> bool:
    """Whether a constant is no parameter but says what an operator does: a scalar, or the factors of a Resize.

    >>> is_setting(ir.Value(name="bound", shape=ir.Shape([])))
    True
    """
    uses = value.uses()
    resizes = bool(uses) and all(use.node.op_type == "Resize" and use.idx > 0 for use in uses)
    return resizes or (value.shape is not None and len(value.shape) == 0)


def remove_unused(model: ir.Model) -> None:
    """Delete nodes and initializers that nothing reads."""
    common.RemoveUnusedNodesPass()(model)


def consumers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """(node, input index) of every use, in the order of the graph."""
    users = {id(use.node) for use in value.uses()}
    nodes = [] if not users else [n for n in _graph_of(value) if id(n) in users]
    for node in nodes:
        yield from ((node, i) for i, used in enumerate(node.inputs) if used is value)


def _graph_of(value: ir.Value) -> ir.Graph:
    return need_graph(next(iter(value.uses())).node)


def describe(node: ir.Node) -> str:
    """A node as messages name it.

    >>> describe(ir.node("Relu", [None], name="/layer1/act"))
    "Relu '/layer1/act'"
    """
    return f"{node.op_type} {node.name or 'without a name'!r}"


def to_bytes(model: ir.Model) -> bytes:
    """The serialized model; equal graphs give equal bytes."""
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def save(model: ir.Model, path: Path) -> None:
    """Write one self-contained file. Raises OutputError."""
    try:
        path.write_bytes(to_bytes(model))
    except OSError as err:
        raise OutputError(f"{path} cannot be written: {err.strerror}") from err
