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
from lorac_exporters.memory_order import ancestors, buffers, byte_size, constant_values, highest

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
    """Bytes that a process needs which trains with one step graph.

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


def peak(model: ir.Model, batch: int, *, optimizer: ir.Model | None = None) -> Peak:
    """The memory of a train_step with ``batch`` images, or of a gradient_step and the ``optimizer`` step after it.

    Raises ValueError naming a value whose size the graph does not tell.
    """
    graphs = [made.graph for made in (model, optimizer) if made is not None]
    weights, derived = _constants(model.graph)
    found = [buffers(graph, batch) for graph in graphs]
    saved = saved_activations(model, batch)
    alive = round(SPREAD * max(highest(one) for one in found))
    return Peak(
        process=PROCESS,
        session=sum(SESSION + PER_NODE * len(one.order) for one in found),
        weights=weights,
        derived=derived,
        state=state(graphs, batch),
        saved=saved,
        working=max(0, alive - saved),
        opening=round(OPENING * (weights + derived)),
    )


def saved_activations(model: ir.Model, batch: int) -> int:
    """Bytes of forward values computed from the images that the backward pass reads, views of a value once."""
    graph = model.graph
    forward = ancestors(next(output for output in graph.outputs if output.name == LOSS))
    activations = {value for node in forward & _from_the_batch(graph) for value in node.outputs}
    found = buffers(graph, batch)
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
