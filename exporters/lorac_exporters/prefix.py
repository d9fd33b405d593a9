"""The frozen front of a network as a graph of its own: what lies before everything that trains (Skip-Cache).

Matsutani et al., arXiv 2410.21073: the results of frozen layers are the same in every epoch, so they are computed once
for each sample. Here they are called features: the values that the rest of the network reads. ``prefix_step.onnx``
computes them from images, and the step graphs take them instead of images, whether anything is kept or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import WEIGHTED, name_of, unique_name, value_names
from lorac_exporters.memory_order import ancestors, constant_values
from lorac_runtime.manifest import Feature

PREFIX = "prefix_step.onnx"
NAMED = "features."  # before the name of a value; a network may have weights that are called so
_MOVES = frozenset({"Slice", "Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Concat"})

log = logging.getLogger(__name__)
Features = dict[str, ir.Value]  # by the name that a feature has in all graphs


def find_features(graph: ir.Graph, changing: Iterable[ir.Value]) -> Features:
    """The values that cut the frozen front off, in the order of the graph; none where there is no front worth it.

    ``changing`` are the inputs that differ from step to step, such as trained tensors. What is a single operator, or
    any number of moves, away from other features is not stored: the rest computes it again, such as the output of a
    frozen convolution beside a branch that reads the same input. A front without a convolution or a product of
    matrices is not worth a graph, and one that hands on anything but a float row per image is not cut off.
    """
    images = graph.inputs[0]
    frozen = _front(graph, images, changing)
    found = _stored(_read_behind(graph, images, frozen), constant_values(graph))
    if not any(node.op_type in WEIGHTED for node in _computing(found) & frozen):
        return {}
    odd = [name_of(value) for value in found if not _is_row(value)]
    if odd:
        log.info("the frozen front is not cut off: %s is not a float tensor with a fixed row per image", odd[0])
        return {}
    taken = value_names(graph)
    return {unique_name(NAMED + name_of(value), taken): value for value in found}


def keep_rest(tape: Tape, features: Features) -> None:
    """Make ``features`` inputs of the tape's graph, in place of the images."""
    for name, value in features.items():
        value.replace_all_uses_with(tape.input(name, dims(value)))
    if features:
        del tape.graph.inputs[0]


def read_features(folder: Path) -> tuple[Feature, ...]:
    """What the prefix_step.onnx in ``folder`` gives, as the manifest names it; () where there is no such file."""
    path = folder / PREFIX
    outputs = ir.load(path).graph.outputs if path.exists() else ()
    return tuple(Feature(name_of(value), sizes(value, 1)) for value in outputs)


def _front(graph: ir.Graph, images: ir.Value, changing: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that read images and nothing that changes, directly or not."""
    moving, reached, found = set(changing), {images}, set()
    for node in graph:
        if any(value in moving for value in node.inputs):
            moving |= set(node.outputs)
        elif any(value in reached for value in node.inputs):
            reached |= set(node.outputs)
            found.add(node)
    return found


def _read_behind(graph: ir.Graph, images: ir.Value, front: set[ir.Node]) -> list[ir.Value]:
    """The values of the front that something behind it reads, the images first, the rest in the order of the graph."""
    values = [images, *(output for node in graph if node in front for output in node.outputs)]
    return [v for v in values if v.is_graph_output() or any(use.node not in front for use in v.uses())]


def _stored(values: list[ir.Value], constants: set[ir.Value]) -> list[ir.Value]:
    """Those that cannot be had from others of them by a single operator, or by moving numbers about."""
    kept: list[ir.Value] = []
    for value in values:
        at_hand = constants.union(kept)
        if not (_follows(value, at_hand) or _is_moved(value, at_hand)):
            kept.append(value)
    return kept


def _follows(value: ir.Value, at_hand: set[ir.Value]) -> bool:
    """Whether the operator that computes ``value`` reads nothing that is not ``at_hand``."""
    node = value.producer()
    return node is not None and all(source is None or source in at_hand for source in node.inputs)


def _is_moved(value: ir.Value, at_hand: set[ir.Value]) -> bool:
    node = value.producer()
    if value in at_hand or node is None or node.op_type not in _MOVES:
        return value in at_hand
    return all(source is None or _is_moved(source, at_hand) for source in node.inputs)


def _computing(values: Iterable[ir.Value]) -> set[ir.Node]:
    return set().union(*(ancestors(value) for value in values))


def _is_row(value: ir.Value) -> bool:
    if value.shape is None or value.dtype != ir.DataType.FLOAT:
        return False
    batch, *row = dims(value) or (None,)
    return batch == "batch" and all(isinstance(d, int) for d in row)
