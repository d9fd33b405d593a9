"""The classifier of a network: finding it, giving it the canonical form, replacing it.

The head is the last Gemm, MatMul or 1 x 1 convolution whose output reaches the graph's output through nothing
but shape operators, pooling, Relu (SqueezeNet) and a closing LogSoftmax. Cross-entropy takes logits; it takes
log-probabilities as well, since log_softmax changes nothing the second time. Probabilities it does not take: a
closing Softmax is refused, because training through it would go wrong in silence, and removing it unasked would make
the adapted file no drop-in for the user's.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import (
    array,
    bypass,
    constant,
    describe,
    float_array,
    input_at,
    int_attribute,
    layer_name,
    name_of,
    need,
    replace_node,
    set_array,
    set_input,
    static_dims,
    unique_name,
    value_names,
)
from lorac_exporters.shapes import settle_shapes
from lorac_runtime.errors import ConversionError

_PASSED = frozenset(
    {
        "AveragePool",
        "Flatten",
        "GlobalAveragePool",
        "Identity",
        "LogSoftmax",
        "ReduceMean",
        "Relu",
        "Reshape",
        "Softmax",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclasses.dataclass(frozen=True)
class Head:
    """The classifier: its node and the names of its tensors.

    ``weight`` is (classes, features), or (classes, features, 1, 1) of a convolution; with ``transposed`` it is
    stored (features, classes), the other way round than nn.Linear.
    """

    node: ir.Node
    weight: str
    bias: str
    classes: int
    transposed: bool


def find_head(model: ir.Model) -> Head:
    """The classifier of a canonical graph.

    Raises ConversionError if the graph's output does not come from one, or is made probabilities by a Softmax.
    """
    _refuse_softmax(model.graph)
    node = _last_linear(model.graph)
    weight = float_array(need(node.inputs[1]))
    bias = input_at(node, 2)
    if bias is None:
        raise ConversionError(f"{describe(node)} has no bias; make the graph canonical first")
    transposed = node.op_type != "Conv" and not int_attribute(node, "transB", 0)
    classes = weight.shape[1] if transposed else weight.shape[0]
    return Head(node, name_of(node.inputs[1]), name_of(bias), classes, transposed)


def normalize_head(model: ir.Model) -> tuple[list[str], list[str]]:
    """Make the head a Gemm with a bias (classes,), zeros where it had none; a 1 x 1 convolution stays one.

    Returns what was changed, and the names of added biases. Shapes must be known.

    Raises ConversionError if there is no head, or if it does not take (batch, features).
    """
    node = _last_linear(model.graph)
    changes = []
    if node.op_type == "MatMul":
        changes = [f"{describe(node)}: now a Gemm"]
        node = _as_gemm(model.graph, node)
    if node.op_type == "Gemm":
        text, added = _own_bias(model.graph, node)
        return changes + text, added
    return changes, []


def replace_head(model: ir.Model, classes: int, *, seed: int) -> None:
    """Give a canonical graph a new classifier for ``classes`` classes, in place; shapes follow.

    The weight is uniform in +-1/sqrt(features), as nn.Linear starts, the bias zero. The same seed gives the same
    numbers. There is no inverse.

    Raises ValueError if there are fewer than 2 classes, ConversionError if the graph has no classifier.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {classes}")
    head = find_head(model)
    weight, bias = need(head.node.inputs[1]), need(input_at(head.node, 2))
    old = float_array(weight).shape
    shape = (*old[:-1], classes) if head.transposed else (classes, *old[1:])
    bound = 1.0 / math.sqrt(math.prod(old) / head.classes)
    numbers = np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)
    set_array(weight, numbers)
    set_array(bias, np.zeros(classes, np.float32))
    _resize_reshapes(head, classes)
    settle_shapes(model)


def remove_softmax(model: ir.Model) -> bool:
    """Let the graph output logits where a closing Softmax made them probabilities; says whether one was there.

    The app that reads the file must then apply softmax by itself, if it needs probabilities. There is no inverse.
    """
    node = _closing_softmax(model.graph)
    if node is None:
        return False
    bypass(node)
    return True


def _refuse_softmax(graph: ir.Graph) -> None:
    node = _closing_softmax(graph)
    if node is not None:
        raise ConversionError(
            f"output {graph.outputs[0].name!r} is made probabilities by {describe(node)}, expected logits: export the "
            "model without its last softmax and apply it in the app (lorac_exporters.heads.remove_softmax does it)"
        )


def _closing_softmax(graph: ir.Graph) -> ir.Node | None:
    node: ir.Node | None = graph.outputs[0].producer()
    while node is not None and node.op_type in ("Flatten", "Identity", "Reshape", "Squeeze"):
        node = need(node.inputs[0]).producer()
    return node if node is not None and node.domain == "" and node.op_type == "Softmax" else None


def _last_linear(graph: ir.Graph) -> ir.Node:
    output = graph.outputs[0]
    value: ir.Value = output
    while (node := value.producer()) is not None:
        if node.op_type in ("Gemm", "MatMul") or _is_pointwise(node):
            return _with_constant_weight(node)
        inner = _head_behind_bias(node)
        if inner is not None:
            return _with_constant_weight(inner)
        if node.domain != "" or node.op_type not in _PASSED:
            break
        value = need(node.inputs[0])
    found = "the graph's input" if node is None else describe(node)
    raise ConversionError(
        f"no classifier found: output {output.name!r} comes from {found}; expected a Gemm, MatMul or 1 x 1 Conv "
        "that gives the logits (pooling, flattening or LogSoftmax behind it is fine)"
    )


def _as_gemm(graph: ir.Graph, matmul: ir.Node) -> ir.Node:
    """Gemm in place of a MatMul and, where one follows, the Add of its bias."""
    if [len(static_dims(value) or ()) for value in matmul.inputs] != [2, 2]:
        raise ConversionError(
            f"{describe(matmul)} gives the logits from an input of shape {need(matmul.inputs[0]).shape}; "
            "expected (batch, features)"
        )
    gemm = ir.node("Gemm", list(matmul.inputs), name=matmul.name)
    readers = [use.node for use in matmul.outputs[0].uses()]
    add = readers[0] if len(readers) == 1 and _head_behind_bias(readers[0]) is matmul else None
    if add is None:
        replace_node(matmul, [gemm], gemm.outputs[0])
        return gemm
    bias = next(value for value in add.inputs if array(value) is not None)
    set_input(gemm, 2, need(bias))
    replace_node(add, [gemm], gemm.outputs[0])
    graph.remove(matmul, safe=True)
    return gemm


def _own_bias(graph: ir.Graph, gemm: ir.Node) -> tuple[list[str], list[str]]:
    classes = (static_dims(gemm.outputs[0]) or (0,))[-1]
    bias = input_at(gemm, 2)
    if bias is None:
        name = unique_name(f"{layer_name(name_of(gemm.inputs[1]))}.bias", value_names(graph))
        set_input(gemm, 2, constant(graph, name, np.zeros(classes or 0, np.float32)))
        return [f"{name}: a bias of zeros for the head"], [name]
    numbers = array(bias)
    if numbers is None:
        raise ConversionError(f"{describe(gemm)} gives the logits, but its bias is computed by the graph")
    if numbers.shape == (classes,):
        return [], []
    set_array(bias, np.broadcast_to(numbers.reshape(-1), (classes or 0,)).copy())
    return [f"{bias.name}: shape {numbers.shape} made {(classes,)}"], []


def _resize_reshapes(head: Head, classes: int) -> None:
    """Flattening behind a convolutional head names the number of classes."""
    value = head.node.outputs[0]
    while uses := list(value.uses()):
        node = uses[0].node
        target = array(node.inputs[1]) if node.op_type == "Reshape" else None
        if target is not None:
            fitted = np.where(target == head.classes, classes, target)
            set_array(need(node.inputs[1]), fitted.astype(np.int64))
        value = node.outputs[0]


def _is_pointwise(node: ir.Node) -> bool:
    return node.op_type == "Conv" and all(d == 1 for d in (static_dims(node.inputs[1]) or (0, 0, 0))[2:])


def _head_behind_bias(node: ir.Node) -> ir.Node | None:
    """The MatMul of a MatMul + Add with a constant vector."""
    if node.op_type != "Add":
        return None
    for value, other in (node.inputs, reversed(node.inputs)):
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "MatMul" and array(other) is not None:
            return producer
    return None


def _with_constant_weight(node: ir.Node) -> ir.Node:
    if array(node.inputs[1]) is None:
        raise ConversionError(f"{describe(node)} gives the logits, but its weight is computed by the graph")
    return node
