"""The memory that a training step needs, computed from its graph: weights, saved activations, and the peak.

Figures hold for the engine ``onnxruntime`` as this project's runtime sets it up; docs/memory.md compares them with
measured ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.gradients.tape import dims
from lorac_exporters.graph_tools import name_of
from lorac_exporters.memory_order import (
    Buffers,
    ancestors,
    buffers,
    byte_size,
    constant_values,
    execution_order,
    highest,
)
from lorac_exporters.prefix import NAMED

MIB = 1 << 20
# Measured with onnxruntime 1.19.2 and 1.31.1, Python 3.11, Linux x86-64; see docs/memory.md.
PROCESS = 53 * MIB  # Python, numpy and onnxruntime, imported
SESSION = 6 * MIB  # a session without a node
PER_NODE = 8 << 10
SPREAD = 1.2  # bytes the allocator takes for a byte of buffers, the rest lies in gaps
OPENING = 0.6  # bytes that optimizing takes while a session is opened, for a byte of weights
LOSS, NEXT = "loss", ".next"


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes that a process needs which trains with one step graph, and the graph of the frozen front if there is one.

    ``weights``: frozen tensors that are read as they lie in the file. ``derived``: those computed from them when the
    session is opened, such as turned kernels. ``saved``: what the forward pass keeps for the backward pass.
    ``working``: what else is alive at the worst moment, gaps of the allocator included. ``state``: everything that
    goes from step to step, twice, and a batch. ``opening``: what opening the session takes beside the weights; it is
    gone when the first step begins.
    """

    process: int
    session: int
    weights: int
    derived: int
    state: int
    saved: int
    working: int
    opening: int

    @property
    def held(self) -> int:
        """Between two steps."""
        return self.process + self.session + self.weights + self.derived

    @property
    def step(self) -> int:
        """At the worst moment of a step."""
        return self.held + self.state + self.saved + self.working

    @property
    def total(self) -> int:
        """The most that the process ever holds."""
        return max(self.step, self.held + self.opening)


def peak(
    model: ir.Model,
    batch: int,
    *,
    optimizer: ir.Model | None = None,
    front: ir.Model | None = None,
    whole: int | None = None,
) -> Peak:
    """The memory of a train_step with ``batch`` images, or of a gradient_step and the ``optimizer`` step after it.

    ``front`` computes the features that they take, for one image at a time and all ``whole`` images of which ``batch``
    are computed together (default: just these); its session stays open beside them.

    Raises ValueError naming a value whose size the graph does not tell.
    """
    return peaks(model, [batch], optimizer=optimizer, front=front, whole=whole)[0]


def peaks(
    model: ir.Model,
    batches: Sequence[int],
    *,
    optimizer: ir.Model | None = None,
    front: ir.Model | None = None,
    whole: int | None = None,
) -> list[Peak]:
    """`peak` for each number of images; what does not depend on it is computed once."""
    graphs = [made.graph for made in (model, optimizer) if made is not None]
    orders = [execution_order(graph) for graph in graphs]
    ahead = [] if front is None else [buffers(front.graph, 1)]
    sizes = [_constants(made.graph) for made in (model, front) if made is not None]
    found = []
    for batch in batches:
        placed = [buffers(graph, batch, order) for graph, order in zip(graphs, orders, strict=True)]
        given = 0 if front is None else _given(front.graph, batch, whole or batch)
        found.append(_peak(model, batch, state(graphs, batch) + given, placed, ahead, sizes))
    return found


def _peak(
    model: ir.Model,
    batch: int,
    state: int,
    found: Sequence[Buffers],
    ahead: Sequence[Buffers],
    sizes: Sequence[tuple[int, int]],
) -> Peak:
    """Of buffers that are known, of the steps and of the front ``ahead`` of them; features count with ``saved``."""
    kept, features = _kept_buffers(model, found[0]), _kept_features(model, batch)
    alive = round(SPREAD * max(highest(one) for one in (*found, *ahead)))
    return Peak(
        process=PROCESS,
        session=sum(_session(one) for one in (*found, *ahead)),
        weights=sum(given for given, _ in sizes),
        derived=sum(computed for _, computed in sizes),
        state=state - features,
        saved=kept + features,
        working=max(0, alive - kept),
        opening=_opening(sizes, sum(_session(one) for one in found)),
    )


def _given(front: ir.Graph, batch: int, whole: int) -> int:
    """Bytes of the images, and of the features of those of them that a step of ``batch`` images does not take now."""
    features = sum(byte_size(value, whole) - byte_size(value, batch) for value in front.outputs)
    return features + sum(byte_size(value, whole) for value in front.inputs)


def _session(one: Buffers) -> int:
    return SESSION + PER_NODE * len(one.order)


def _opening(sizes: Sequence[tuple[int, int]], session: int) -> int:
    """What opening takes beyond all that is held in the end: the front opens first, when the rest is not there yet."""
    rest, *front = (sum(size) for size in sizes)
    return round(max([OPENING * rest] + [OPENING * size - rest - session for size in front]))


def saved_activations(model: ir.Model, batch: int) -> int:
    """Bytes of forward values computed from the images that the backward pass reads, views of a value once.

    Features of a frozen front are among them.
    """
    return _kept_buffers(model, buffers(model.graph, batch)) + _kept_features(model, batch)


def _kept_features(model: ir.Model, batch: int) -> int:
    graph = model.graph
    forward = ancestors(next(output for output in graph.outputs if output.name == LOSS))
    features = [v for v in graph.inputs if name_of(v).startswith(NAMED) and "batch" in dims(v)]  # no weights
    return sum(byte_size(v, batch) for v in features if any(use.node not in forward for use in v.uses()))


def _kept_buffers(model: ir.Model, found: Buffers) -> int:
    graph = model.graph
    forward = ancestors(next(output for output in graph.outputs if output.name == LOSS))
    activations = {value for node in forward & _from_the_batch(graph) for value in node.outputs}
    kept = {
        found.root[value]
        for node in found.order
        if node not in forward
        for value in node.inputs
        if value in found.root and value in activations
    }
    return sum(found.size[root] for root in kept)


def _from_the_batch(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that read images or labels, directly or not."""
    reached = {value for value in graph.inputs if "batch" in dims(value)}
    found = set()
    for node in graph:
        if any(value in reached for value in node.inputs):
            found.add(node)
            reached |= set(node.outputs)
    return found


def state(graphs: Sequence[ir.Graph], batch: int) -> int:
    """Bytes of all inputs; those that carry over count twice, since a step reads one copy and writes the other."""
    carried = {(output.name or "").removesuffix(NEXT) for graph in graphs for output in graph.outputs}
    inputs = {name_of(value): value for graph in graphs for value in graph.inputs}
    return sum(byte_size(value, batch) * (2 if name in carried else 1) for name, value in inputs.items())


def _constants(graph: ir.Graph) -> tuple[int, int]:
    """Bytes of (initializers, values computed from them) that a step reads."""
    constants = constant_values(graph)
    read = {
        value
        for node in graph
        if not all(output in constants for output in node.outputs)
        for value in node.inputs
        if value in constants
    }
    sizes = {value: byte_size(value, 0) for value in read}
    given = sum(size for value, size in sizes.items() if value.producer() is None)
    return given, sum(sizes.values()) - given
