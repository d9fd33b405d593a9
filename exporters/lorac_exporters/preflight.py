"""Which operators an engine can train through; found out before any work is done.

Only nodes on a gradient path matter: those between a tensor that trains and the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.rules import RULES
from lorac_exporters.graph_tools import describe, int_attribute, static_dims, text_attribute
from lorac_runtime.errors import ConversionError, listed


@dataclasses.dataclass(frozen=True)
class Problem:
    """A node that an engine cannot differentiate, and why."""

    operator: str
    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What an engine can differentiate: operators; conditions on some of them; reasons for known refusals.

    A condition returns why a node cannot be trained, or None.
    """

    operators: frozenset[str]
    conditions: Mapping[str, Callable[[ir.Node], str | None]]
    refusals: Mapping[str, str]


def _constant_mode_only(node: ir.Node) -> str | None:
    mode = text_attribute(node, "mode", "constant")
    return None if mode == "constant" else f"the gradient exists for constant padding only, this pads by {mode}"


def _right_conv_gradients_only(node: ir.Node) -> str | None:
    """Two kinds of convolution get wrong gradients from the engine, without a word."""
    mode = text_attribute(node, "auto_pad", "NOTSET")
    if mode != "NOTSET":
        return f"the gradient is wrong with auto_pad {mode}; make the graph canonical"
    resized = _changes_1d_size(static_dims(node.inputs[0]), static_dims(node.outputs[0]))
    if resized and int_attribute(node, "group", 1) > 1:
        return "the gradient of a grouped 1-D convolution is wrong unless channels and length stay the same"
    return None


def _changes_1d_size(before: tuple[int | None, ...] | None, after: tuple[int | None, ...] | None) -> bool:
    return before is not None and len(before) == 3 and (after is None or before[1:] != after[1:])


_NO_KERNEL = "the gradient has no CPU kernel"
_CRASH = "the gradient's CPU kernel ends the process"

# Measured operator by operator with onnxruntime-training-cpu 1.19.2 (tests/test_preflight.py does it again).
ENGINES: Mapping[str, Abilities] = {
    "onnxruntime-training": Abilities(
        operators=frozenset(
            [
                "Abs",
                "Add",
                "BatchNormalization",
                "Cast",
                "Clip",
                "Concat",
                "Conv",
                "Cos",
                "Div",
                "Dropout",
                "Erf",
                "Exp",
                "Expand",
                "Flatten",
                "Gather",
                "Gemm",
                "GlobalAveragePool",
                "Identity",
                "LeakyRelu",
                "Log",
                "LogSoftmax",
                "MatMul",
                "Max",
                "MaxPool",
                "Min",
                "Mul",
                "Neg",
                "Pad",
                "Pow",
                "Reciprocal",
                "ReduceL2",
                "ReduceLogSumExp",
                "ReduceMean",
                "ReduceSum",
                "Relu",
                "Reshape",
                "Sigmoid",
                "Sin",
                "Slice",
                "Softmax",
                "Split",
                "Sqrt",
                "Squeeze",
                "Sub",
                "Tanh",
                "Tile",
                "Transpose",
                "Unsqueeze",
                "Where",
            ]
        ),
        conditions={"Pad": _constant_mode_only, "Conv": _right_conv_gradients_only},
        refusals={"AveragePool": _CRASH, "ConvTranspose": _NO_KERNEL, "Resize": _NO_KERNEL},
    ),
    "onnxruntime": Abilities(operators=frozenset(RULES), conditions={}, refusals={}),
}


def untrainable(model: ir.Model, trainable_names: Iterable[str], *, engine: str) -> tuple[Problem, ...]:
    """Nodes between the tensors ``trainable_names`` and the output that ``engine`` cannot differentiate.

    ``model`` is a canonical graph: element types must be known to tell masks and sizes from activations.

    Raises ValueError for an unknown engine or a name that is no initializer of the graph.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    abilities = ENGINES[engine]
    reasons = ((node, _reason(node, abilities)) for node in _gradient_path(model.graph, set(trainable_names)))
    return tuple(Problem(node.op_type, describe(node), text) for node, text in reasons if text is not None)


def require_none(problems: Sequence[Problem], *, engine: str) -> None:
    """Refuse a model with these `untrainable` nodes. Raises ConversionError naming each, and what can be done."""
    if problems:
        headline = (
            f"the engine {engine} cannot train through these nodes; train fewer layers (method head), "
            "or replace the operators in the model:"
        )
        raise ConversionError(listed(headline, [f"{p.node}: {p.reason}" for p in problems]))


def _reason(node: ir.Node, abilities: Abilities) -> str | None:
    operator = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
    if operator in abilities.operators:
        condition = abilities.conditions.get(operator)
        return None if condition is None else condition(node)
    return abilities.refusals.get(operator, f"{operator} has no gradient")


def _gradient_path(graph: ir.Graph, trainable: set[str]) -> list[ir.Node]:
    unknown = sorted(trainable - graph.initializers.keys())
    if unknown:
        raise ValueError(f"no initializers of the graph: {', '.join(unknown)}")
    changing = {id(graph.initializers[name]) for name in trainable}
    forward = []
    for node in graph:
        if any(id(value) in changing for value in node.inputs):
            changing |= {id(output) for output in node.outputs if _carries_gradient(output)}
            forward.append(node)
    reaching = {id(value) for value in graph.outputs}
    path = []
    for node in reversed(forward):
        if any(id(output) in reaching and id(output) in changing for output in node.outputs):
            reaching |= {id(value) for value in node.inputs}
            path.append(node)
    return path[::-1]


def _carries_gradient(value: ir.Value) -> bool:
    """Integers and truth values (shapes, masks) end a gradient path; an unknown type is taken for float."""
    return value.dtype is None or value.dtype.is_floating_point()
