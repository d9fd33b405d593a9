"""Partial connections as nodes of a graph: some input channels of a weight are a tensor of their own.

``branch`` computes layer(x, W) + layer(x[channels], P - W[:, channels]): the trunk keeps its constant weight, and no
gradient of the whole weight is ever formed. ``weight`` computes layer(x, W with P in its places). Both equal a layer
whose ``weight[:, channels]`` is P.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import (
    constant,
    need,
    producer,
)
from lorac_exporters.linear_layers import weighted_nodes
from lorac_exporters.memory_order import ancestors
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Partial

PartialForm = Literal["branch", "weight"]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The channels of a layer's input that its trained ones read: the value ``few``, and their places in the input.

    ``picks`` is the constant that says which they are. It counts as changing where the frozen front of a network is
    cut off, so that a feature is a layer's whole input, not these channels beside its output.
    """

    few: ir.Value
    index: tuple[int, ...]
    picks: ir.Value


def add_partials(
    tape: Tape, partials: Iterable[Partial], tensors: Mapping[str, ir.Value], *, form: PartialForm = "branch"
) -> list[Chosen]:
    """Give every layer of ``partials`` its trained channels, the values ``tensors`` by name, in place.

    Returns what the branches read, for `read_again`. Raises ConversionError if a weight is not that of a convolution
    or of a fully connected layer.
    """
    nodes, found = weighted_nodes(tape.graph), list[Chosen]()
    for partial in partials:
        node = _layer_of(nodes, partial)
        if form == "branch":
            found.append(_add_branch(tape, node, partial, tensors[partial.tensor]))
        else:
            _replace_weight(tape, node, partial, tensors[partial.tensor])
    tape.graph.sort()
    return found


def read_again(tape: Tape, chosen: Iterable[Chosen], loss: ir.Value) -> None:
    """Let the gradients of ``loss`` take their channels from a layer's input that another gradient reads anyway.

    Such an input is kept for the backward pass (that of a layer behind a ReLU, for its mask; an image), and the
    channels would be kept beside it. It changes no value.
    """
    forward = ancestors(loss)
    for item in chosen:
        whole = need(producer(item.few).inputs[0])
        later = [use for use in item.few.uses() if use.node not in forward]
        kept = whole.producer() is None or any(use.node not in forward for use in whole.uses())
        if later and kept:
            again = tape.op("Gather", whole, tape.ints(*item.index), like=item.few, attributes={"axis": 1})
            for use in later:
                use.node.replace_input_with(use.idx, again)
    tape.graph.sort()


def inject_partial(graph: ir.Graph, partial: Partial, start: npt.NDArray[np.float32]) -> None:
    """The ``weight`` form for an engine that differentiates by itself; ``tensor`` is an initializer, at ``start``.

    Raises ConversionError as `add_partials` does.
    """
    trained = constant(graph, partial.tensor, start)
    add_partials(Tape(graph), [partial], {partial.tensor: trained}, form="weight")


def _layer_of(nodes: Mapping[str, ir.Node], partial: Partial) -> ir.Node:
    if partial.weight not in nodes:
        raise ConversionError(f"no layer of the graph uses {partial.weight}; was the graph changed?")
    return nodes[partial.weight]


def _add_branch(tape: Tape, node: ir.Node, partial: Partial, trained: ir.Value) -> Chosen:
    y, x, weight = node.outputs[0], need(node.inputs[0]), need(node.inputs[1])
    before = tape.op("Gather", weight, tape.ints(*partial.channels), like=trained, attributes={"axis": 1})
    change = tape.op("Sub", trained, before, like=trained, name=f"{partial.layer}.change")
    chosen = _chosen(tape, x, partial)
    kept = {name: a.value for name, a in node.attributes.items() if name != "beta"}
    result = tape.op(node.op_type, chosen.few, change, like=y, attributes=kept, name=f"{partial.layer}.partial_output")
    total = tape.op("Add", y, result, like=y, name=f"{partial.layer}.adapted")
    adder = producer(total)
    y.replace_all_uses_with(total, replace_graph_outputs=True)
    adder.replace_input_with(0, y)
    return chosen


def _chosen(tape: Tape, x: ir.Value, partial: Partial) -> Chosen:
    """The channels of ``x`` that the trained ones read, of each group.

    With spatial axes by a pointwise convolution with one-hot weights: engines would merge a `Gather` with that of
    `read_again`, and keep its result.
    """
    count, channels = partial.weight_shape[1], partial.channels
    index = tuple(group * count + channel for group in range(partial.groups) for channel in channels)
    shape = (dims(x)[0], len(index), *dims(x)[2:])
    places = tape.constant(np.array(channels * partial.groups, np.int64), f"{partial.layer}.channels")
    if len(shape) == 2:
        return Chosen(tape.op("Gather", x, places, shape=shape, attributes={"axis": 1}), index, places)
    depth, levels = tape.constant(np.int64(count)), tape.constant(np.array([0, 1], np.float32))
    rows = tape.op("OneHot", places, depth, levels, shape=(len(index), count))
    flat = (len(index), count, *[1] * (len(shape) - 2))
    picks = tape.op("Reshape", rows, tape.ints(*flat), shape=flat)
    few = tape.op("Conv", x, picks, shape=shape, attributes={"group": partial.groups})
    return Chosen(few, index, places)


def _replace_weight(tape: Tape, node: ir.Node, partial: Partial, trained: ir.Value) -> None:
    """Trained channels and the others side by side, then each at its place."""
    weight, shape = need(node.inputs[1]), partial.weight_shape
    others = [channel for channel in range(shape[1]) if channel not in set(partial.channels)]
    if not others:
        node.replace_input_with(1, trained)
        return
    rest = _columns(tape, weight, others, (shape[0], len(others), *shape[2:]))
    joined = tape.op("Concat", trained, rest, like=weight, attributes={"axis": 1})
    order = [int(place) for place in np.argsort([*partial.channels, *others])]
    node.replace_input_with(1, _columns(tape, joined, order, shape))


def _columns(tape: Tape, value: ir.Value, places: Sequence[int], shape: Sequence[int]) -> ir.Value:
    return tape.op("Gather", value, tape.ints(*places), shape=shape, attributes={"axis": 1})
