"""A loss that the artifact's maker gives as an ONNX graph, put behind the network's outputs.

Inputs named like outputs of the network take them; every other input is a target, which a device reads from its data
by that name. The graph has one output, ``loss``, a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from lorac_exporters import cleaning
from lorac_exporters.gradients.class_losses import WRITTEN_OUT
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import Array, array, describe, name_of, static_dims
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.shapes import BATCH, settle_shapes
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.tasks import TARGET_DTYPES, Output, Target

LOSS = "loss"
_TAKEN = ("images", "samples", "ids", "lr", "step", "weight", "gradient_norm")  # names of data and of steps
_DTYPES = {ir.DataType.INT64: "int64", ir.DataType.FLOAT: "float32"}


def read_loss_graph(path: Path, outputs: Sequence[Output], *, reserved: Sequence[str] = ()) -> ir.Model:
    """The graph in the file, cleaned, its shapes known, fit for a network with these ``outputs``.

    ``reserved`` are names of the network that no target may have.

    Raises ConversionError listing everything in it that does not fit.
    """
    model = read_graph(path)
    cleaning.inline_functions(model)
    cleaning.own_initializers(model)
    problems = [*_interface_problems(model.graph, outputs, reserved), *_node_problems(model.graph)]
    if not problems:
        problems = _settled(model, outputs)
    if problems:
        raise ConversionError(listed(f"{path} is no loss for this network:", problems))
    return model


def targets_of(model: ir.Model, outputs: Sequence[Output]) -> tuple[Target, ...]:
    """What a loss graph wants beside the outputs."""
    known = {output.name for output in outputs}
    own = [value for value in model.graph.inputs if value.name not in known]
    return tuple(Target(name_of(v), _DTYPES[v.dtype], _row(v)) for v in own if v.dtype is not None)


def append_loss_graph(
    tape: Tape, model: ir.Model, outputs: Mapping[str, ir.Value], targets: Mapping[str, ir.Value]
) -> ir.Value:
    """Write the loss graph at the end of the tape's graph; returns the loss."""
    given = {**outputs, **targets}
    known: dict[ir.Value, ir.Value] = {value: given[name_of(value)] for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        known[value] = tape.constant(_numbers(value))
    for node in model.graph:
        inputs = [None if value is None else known[value] for value in node.inputs]
        known.update(zip(node.outputs, _written(tape, node, inputs), strict=False))
    return known[model.graph.outputs[0]]


def _written(tape: Tape, node: ir.Node, inputs: list[ir.Value | None]) -> Sequence[ir.Value]:
    """The outputs of a copy of the node, or of what it is written out as."""
    if node.op_type in WRITTEN_OUT:
        return WRITTEN_OUT[node.op_type](tape, node, inputs)
    twin = ir.Node("", node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
    twin.name = tape.fresh(f"loss.{node.op_type.lower()}")
    for index, (copy, own) in enumerate(zip(twin.outputs, node.outputs, strict=True)):
        copy.name = tape.fresh(f"{twin.name}.{index}") if index else twin.name
        copy.type, copy.shape = own.type, own.shape
    tape.graph.append(twin)
    return twin.outputs


def _interface_problems(graph: ir.Graph, outputs: Sequence[Output], reserved: Sequence[str]) -> Iterator[str]:
    names = [str(value.name) for value in graph.outputs]
    if names != [LOSS]:
        yield f"its outputs are {', '.join(names) or 'none'}, expected one that is called {LOSS}"
    known = {output.name: output for output in outputs}
    if not any(value.name in known for value in graph.inputs):
        found = ", ".join(str(value.name) for value in graph.inputs) or "none"
        yield f"no input is called like an output of the network ({', '.join(known)}); its inputs are {found}"
    for value in graph.inputs:
        if value.name in known:
            yield from _output_problems(value, known[str(value.name)])
        else:
            yield from _target_problems(value, reserved)


def _output_problems(value: ir.Value, output: Output) -> Iterator[str]:
    """What an input that takes an output of the network says of it."""
    if value.dtype != ir.DataType.FLOAT:
        yield f"input {value.name!r} is {_kind(value)}, the network's output is float32"
    dims = static_dims(value)
    fits = dims is None or (
        len(dims) == 1 + len(output.shape)
        and all(own in (None, size) for own, size in zip(dims[1:], output.shape, strict=True))
    )
    if not fits:
        expected = ("batch", *output.shape)
        yield f"input {value.name!r} has shape {value.shape}, the network's output {_text(expected)}"


def _target_problems(value: ir.Value, reserved: Sequence[str]) -> Iterator[str]:
    if value.name in (*_TAKEN, *reserved):
        yield f"input {value.name!r} has a name that is taken; call this target otherwise"
    if value.dtype not in _DTYPES:
        yield f"input {value.name!r} is {_kind(value)}, expected {' or '.join(TARGET_DTYPES)}, or an output's name"
    dims = static_dims(value)
    if not dims or None in dims[1:]:
        yield (
            f"input {value.name!r} has shape {value.shape}, expected the batch and then numbers: give every sample "
            "the same shape, filled up where it has less (and a target that says what counts)"
        )


def _node_problems(graph: ir.Graph) -> Iterator[str]:
    for node in graph:
        if node.domain != "":
            yield f"{describe(node)}: operator of {node.domain}, expected ONNX's own operators only"
        elif any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            yield f"{describe(node)}: control flow; write the loss for a whole batch at once"


def _settled(model: ir.Model, outputs: Sequence[Output]) -> list[str]:
    """Give every value its shape, in place; returns what is wrong then."""
    known = {output.name: output.shape for output in outputs}
    for value in model.graph.inputs:
        row = known[str(value.name)] if value.name in known else _row(value)
        value.shape = ir.Shape([BATCH, *row])
    cleaning.fold_constants(model)
    cleaning.drop_idle_nodes(model)
    settle_shapes(model)
    problems = list(_rule_problems(model.graph, set(known)))
    loss = model.graph.outputs[0]
    if loss.dtype != ir.DataType.FLOAT or static_dims(loss) != ():
        problems.append(
            f"{LOSS} is {_kind(loss)} of shape {loss.shape}, expected a float32 scalar: reduce it, as by a mean, "
            "without keeping axes"
        )
    return problems


def _rule_problems(graph: ir.Graph, outputs: set[str]) -> Iterator[str]:
    """Nodes between the network and the loss that no gradient can pass."""
    reached = {value for value in graph.inputs if value.name in outputs}
    for node in graph:
        if not any(value in reached for value in node.inputs):
            continue
        unknown = [v for v in node.outputs if v.dtype is None or v.dtype.is_floating_point()]
        reached |= set(unknown)
        if unknown and node.op_type not in RULES and node.op_type not in WRITTEN_OUT:
            yield f"{describe(node)}: {node.op_type} has no gradient; write it with other operators"
    if graph.outputs[0] not in reached:
        yield f"{LOSS} does not depend on any output of the network"


def _numbers(value: ir.Value) -> Array:
    numbers = array(value)
    assert numbers is not None
    return numbers


def _row(value: ir.Value) -> tuple[int, ...]:
    return tuple(size for size in (static_dims(value) or ())[1:] if size is not None)


def _kind(value: ir.Value) -> str:
    return "of unknown type" if value.dtype is None else value.dtype.name.lower()


def _text(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))})"
