"""Networks that are no classifiers: what they answer, and the layers that their answers come from."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from lorac_exporters.graph_tools import array, describe, input_at, name_of, static_dims
from lorac_exporters.loss_graph import read_loss_graph, targets_of
from lorac_exporters.memory_order import ancestors
from lorac_exporters.task_config import TaskConfig as TaskConfig
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.tasks import CLASSIFICATION, CUSTOM, IGNORED, SEGMENTATION, Output, Task, built_in_targets

_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Purpose:
    """A task as one network has it, and the graph of its own loss, if it has one."""

    task: Task
    loss: ir.Model | None = None


def purpose_of(model: ir.Model, config: TaskConfig) -> Purpose | None:
    """What ``config`` comes to for a canonical graph; None of classification.

    Raises ConversionError if the outputs, or the loss graph, do not fit.
    """
    if config.kind == CLASSIFICATION:
        return None
    outputs = _outputs(model)
    if config.loss_graph is not None:
        names = [name_of(value) for value in (*model.graph.inputs, *model.graph.initializers.values())]
        loss = read_loss_graph(config.loss_graph, outputs, reserved=names)
        return Purpose(Task(CUSTOM, outputs, targets_of(loss, outputs)), loss)
    if len(outputs) != 1:
        names = [output.name for output in outputs]
        raise ConversionError(
            f"the model has {len(outputs)} outputs ({', '.join(names)}), and {config.kind} has one: drop the others, "
            "or give the loss of all as a graph (--loss-graph)"
        )
    if config.kind == SEGMENTATION and (len(outputs[0].shape) < 2 or outputs[0].shape[0] < 2):
        raise ConversionError(
            f"output {outputs[0].name!r} has the shape {('batch', *outputs[0].shape)}, expected scores of two classes "
            "or more, (batch, classes, height, width)"
        )
    task = Task(config.kind, outputs, built_in_targets(config.kind, outputs[0]), config.ignore_index)
    if config.kind == SEGMENTATION and config.ignore_index is None and task.classes <= IGNORED:
        task = dataclasses.replace(task, ignore_index=IGNORED)
    return Purpose(task)


def find_heads(model: ir.Model) -> tuple[ir.Node, ...]:
    """The last weighted layers before the outputs, in the order of the graph; none of them feeds another.

    Raises ConversionError where an output comes from no such layer.
    """
    found: set[ir.Node] = set()
    for output in model.graph.outputs:
        behind = _last_weighted(output)
        if not behind:
            raise ConversionError(f"output {output.name!r} comes from no convolution and no fully connected layer")
        found |= behind
    below = {node for head in found for value in head.inputs if value is not None for node in ancestors(value)}
    return tuple(node for node in model.graph if node in found - below)


def _last_weighted(output: ir.Value) -> set[ir.Node]:
    """Layers with a stored weight from which nothing weighted lies on the way to ``output``."""
    found, seen, waiting = set[ir.Node](), set[ir.Node](), [output.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _WEIGHTED and array(input_at(node, 1)) is not None:
            found.add(node)
        else:
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _outputs(model: ir.Model) -> tuple[Output, ...]:
    problems = []
    for value in model.graph.outputs:
        dims = static_dims(value)
        if value.dtype != ir.DataType.FLOAT or not dims or len(dims) < 2 or None in dims[1:]:
            kind = "unknown" if value.dtype is None else value.dtype.name.lower()
            node = value.producer()
            source = "" if node is None else f", from {describe(node)}"
            problems.append(f"output {value.name!r} is {kind} of shape {value.shape}{source}")
    if problems:
        headline = (
            "outputs must be float32 with the batch first and all other sizes fixed: export the network without what "
            "picks boxes (non-maximum suppression, thresholds) behind it:"
        )
        raise ConversionError(listed(headline, problems))
    rows = [(value, (static_dims(value) or ())[1:]) for value in model.graph.outputs]
    return tuple(Output(name_of(v), tuple(size for size in row if size is not None)) for v, row in rows)
