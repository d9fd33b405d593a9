"""The loss of a step graph: a built-in one, or the artifact maker's own, with the inputs that it compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.tape import Dim, Tape, dims
from lorac_exporters.gradients.task_losses import Compared, built_in_loss
from lorac_exporters.graph_tools import array, name_of
from lorac_exporters.loss_graph import append_loss_graph
from lorac_exporters.task_graph import Purpose
from lorac_runtime.tasks import CLASSIFICATION, LABELS, Target
from lorac_runtime.training_defaults import TrainingDefaults

Input = Callable[[str, Sequence[Dim], ir.DataType], ir.Value]
KINDS = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}


def append_loss(
    tape: Tape, purpose: Purpose | None, settings: TrainingDefaults, *, make_input: Input, base: ir.Model | None
) -> ir.Value:
    """Write the loss at the end of the tape's graph. ``make_input`` makes an input of it.

    ``base`` is the network as it was before anything was added, for the loss that compares with its answers.
    """
    outputs = {name_of(value): value for value in tape.graph.outputs}
    given = {t.name: make_input(t.name, ("batch", *t.shape), KINDS[t.dtype]) for t in _targets(tape, purpose, settings)}
    if purpose is not None and purpose.loss is not None:
        return append_loss_graph(tape, purpose.loss, outputs, given)
    compared = Compared(
        kind=CLASSIFICATION if purpose is None else purpose.task.kind,
        output=tape.graph.outputs[0],
        target=next(iter(given.values()), None),
        base=None if settings.loss != "distillation" or base is None else _answers(tape, base),
        ignore=None if purpose is None else purpose.task.ignore_index,
    )
    return built_in_loss(tape, compared, settings)


def _targets(tape: Tape, purpose: Purpose | None, settings: TrainingDefaults) -> Sequence[Target]:
    if settings.loss == "entropy":
        return ()
    if purpose is not None:
        return purpose.task.targets
    pixels = dims(tape.graph.outputs[0])[2:]
    return (Target(LABELS, "int64", tuple(size for size in pixels if isinstance(size, int))),)


def _answers(tape: Tape, base: ir.Model) -> ir.Value:
    """The output of a frozen copy of the network; weights that do not change are not stored twice."""
    graph = tape.graph
    known = dict(zip(base.graph.inputs, graph.inputs, strict=False))
    known |= {value: _frozen(tape, value) for value in base.graph.initializers.values()}
    for node in base.graph:
        inputs = [None if value is None else known[value] for value in node.inputs]
        twin = ir.Node("", node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
        twin.name = tape.fresh(f"base.{node.name}")
        for copy, own in zip(twin.outputs, node.outputs, strict=True):
            copy.name, copy.type, copy.shape = tape.fresh(f"base.{own.name}"), own.type, own.shape
        graph.append(twin)
        known.update(zip(node.outputs, twin.outputs, strict=True))
    return known[base.graph.outputs[0]]


def _frozen(tape: Tape, value: ir.Value) -> ir.Value:
    """The tensor of that name in the graph, if it holds these numbers and does not change; else a copy of its own."""
    name, numbers = name_of(value), array(value)
    assert numbers is not None
    kept = array(tape.graph.initializers.get(name))
    if kept is not None and kept.shape == numbers.shape and np.array_equal(kept, numbers):
        return tape.graph.initializers[name]
    return tape.constant(numbers, f"base.{name}")
