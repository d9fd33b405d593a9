"""What onnxruntime does with a step graph: constants it computes at load, the order it runs nodes in, what stays alive.

All of it follows from the graph alone, at a given batch size; nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.tape import Dim, dims
from lorac_exporters.graph_tools import describe, name_of, need

_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_SAME_COUNT = _VIEWS | {"Transpose", "ScatterElements"}
_IN_PLACE = frozenset(
    {"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "Add", "Sub", "Mul", "Div", "Sqrt", "Exp", "Neg", "Cast"}
)


def byte_size(value: ir.Value, batch: int) -> int:
    """Bytes of a value at this batch size.

    Raises ValueError naming a value whose size cannot be told from its graph.
    """
    if value.dtype is None:
        raise ValueError(f"the element type of {name_of(value)!r} is not known")
    return _count(value, batch) * math.ceil(value.dtype.itemsize)


def _count(value: ir.Value, batch: int) -> int:
    """Elements; what only moves or replaces some has as many as its first input."""
    found = None if value.shape is None else [_size(d, batch) for d in dims(value)]
    if found is not None and all(isinstance(d, int) for d in found):
        return math.prod(d for d in found if d is not None)
    node = value.producer()
    if node is not None and node.op_type in _SAME_COUNT:
        return _count(need(node.inputs[0]), batch)
    if node is not None and node.op_type == "ConstantOfShape":
        return _product(need(node.inputs[0]), batch)
    if node is not None and node.op_type == "Range":
        start, limit, delta = (_product(need(v), batch) for v in node.inputs)
        return max(0, math.ceil((limit - start) / delta))
    where = "an input" if node is None else describe(node)
    raise ValueError(f"the size of {name_of(value)!r} ({where}) is not known; its shape is {value.shape}")


def _product(sizes: ir.Value, batch: int) -> int:
    """Of the numbers in a tensor of sizes; a single one itself."""
    if sizes.const_value is not None:
        return math.prod(int(n) for n in sizes.const_value.numpy().ravel())
    node = sizes.producer()
    if node is not None and node.op_type == "Size":
        return _count(need(node.inputs[0]), batch)
    if node is not None and node.op_type in _VIEWS:
        return _product(need(node.inputs[0]), batch)
    raise ValueError(f"the sizes in {name_of(sizes)!r} are not known: they are computed while the graph runs")


def _size(dim: Dim, batch: int) -> int | None:
    return batch if dim == "batch" else dim if isinstance(dim, int) else None


def constant_values(graph: ir.Graph) -> set[ir.Value]:
    """Initializers, and what is computed from nothing else: engines compute that once, when they load the graph."""
    found = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in found for value in inputs):
            found |= set(node.outputs)
    return found


def execution_order(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that run at every step, in onnxruntime's default order.

    That order is a depth-first walk from the last node without readers upwards; of a node's inputs the one that comes
    last in the file is computed first.
    """
    constants = constant_values(graph)
    nodes = [node for node in graph if not all(output in constants for output in node.outputs)]
    place = {node: index for index, node in enumerate(nodes)}
    leaves = [node for node in nodes if not any(use.node in place for out in node.outputs for use in out.uses())]
    return _walked(leaves, place)


def _walked(leaves: Sequence[ir.Node], place: dict[ir.Node, int]) -> list[ir.Node]:
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stack = [(leaf, False) for leaf in leaves]
    while stack:
        node, entered = stack.pop()
        if entered:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before in _sources(node, place) if before not in seen]
    return order


def _sources(node: ir.Node, place: dict[ir.Node, int]) -> list[ir.Node]:
    producers = {value.producer() for value in node.inputs if value is not None}
    return sorted((p for p in producers if p is not None and p in place), key=lambda p: place[p])


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Buffers of one step: ``root`` is where a value's numbers lie, ``size`` the bytes of each root, ``last`` its
    last reader's place in the order."""

    order: list[ir.Node]
    root: dict[ir.Value, ir.Value]
    size: dict[ir.Value, int]
    last: dict[ir.Value, int]


def buffers(graph: ir.Graph, batch: int, order: list[ir.Node] | None = None) -> Buffers:
    """Which values share a buffer: views do, and elementwise results take the place of an input nothing else reads.

    Inputs, constants and outputs of the graph have no buffer here: their owner holds them. ``order`` is what
    `execution_order` gives, for those who know it already.
    """
    order = execution_order(graph) if order is None else order
    place = {node: index for index, node in enumerate(order)}
    found = Buffers(order, {}, {}, {})
    for node in order:
        for output in node.outputs:
            if not output.is_graph_output():
                _place_output(found, place, node, output, byte_size(output, batch))
    return found


def _place_output(found: Buffers, place: dict[ir.Node, int], node: ir.Node, output: ir.Value, size: int) -> None:
    source = _taken_over(found, place, node, size)
    if source is None:
        found.size[output] = size
        source = output
    found.root[output] = source
    readers = [place[use.node] for use in output.uses() if use.node in place]
    found.last[source] = max([found.last.get(source, 0), place[node], *readers])


def _taken_over(found: Buffers, place: dict[ir.Node, int], node: ir.Node, size: int) -> ir.Value | None:
    """The buffer that a node's first output lies in, if it is one that is there already."""
    if node.op_type in _VIEWS:
        return found.root.get(need(node.inputs[0]))
    if node.op_type not in _IN_PLACE:
        return None
    roots = [found.root[value] for value in node.inputs if value in found.root]
    return next((r for r in roots if found.size[r] == size and found.last[r] <= place[node]), None)


def highest(found: Buffers) -> int:
    """Bytes of buffers alive at the worst moment."""
    ending: dict[int, list[ir.Value]] = {}
    for root, index in found.last.items():
        ending.setdefault(index, []).append(root)
    alive, worst = 0, 0
    for index, node in enumerate(found.order):
        alive += sum(found.size[v] for v in set(node.outputs) if v in found.size)
        worst = max(worst, alive)
        alive -= sum(found.size[root] for root in ending.get(index, ()))
    return worst


def ancestors(target: ir.Value, stop: Iterable[ir.Value] = ()) -> set[ir.Node]:
    """The nodes that ``target`` is computed by, not looking beyond ``stop``."""
    barred, found, ahead = set(stop), set(), [target]
    while ahead:
        node = ahead.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            ahead += [value for value in node.inputs if value is not None and value not in barred]
    return found
