"""Shapes that depend on nothing but the batch size: found by tracing a graph at two batch sizes.

With the batch fixed, every shape computation of a CNN folds to constants. What is equal at two batch sizes is a
constant of the model; what differs is the batch axis. So no rule per exporter is needed.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxscript.optimizer

from lorac_exporters.graph_tools import (
    Array,
    array,
    constant,
    describe,
    input_at,
    name_of,
    need,
    nodes_of,
    remove_unused,
    set_input,
    unique_name,
    value_names,
)
from lorac_runtime.errors import ConversionError, listed

BATCH = "batch"
_SIZES = (2, 3)  # the two batch sizes compared; 1 would hide a batch axis behind broadcasting

Shape = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """What is known when the batch is fixed: shapes, element types and constant values, by value name."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, ir.TypeProtocol]
    constants: dict[str, Array]


def trace(model: ir.Model, batch: int) -> Trace:
    """Infer every shape of ``model`` for inputs of ``batch`` samples; the model itself is not changed."""
    twin = model.clone()
    for value in twin.graph.inputs:
        value.shape = ir.Shape([batch, *list(value.shape or ())[1:]])
    for node in twin.graph:
        for output in node.outputs:
            output.shape = None
    onnxscript.optimizer.fold_constants(twin, onnx_shape_inference=True, should_fold=_computes_sizes)
    values = [*twin.graph.inputs, *twin.graph.initializers.values()]
    values += [output for node in twin.graph for output in node.outputs]
    named = {name_of(v): v for v in values if v.name}
    shapes = {name: v.shape.numpy() for name, v in named.items() if v.shape is not None and v.shape.is_static()}
    constants = {name: numbers for name, v in named.items() if (numbers := array(v)) is not None}
    return Trace(shapes, {name: v.type for name, v in named.items() if v.type is not None}, constants)


def _computes_sizes(node: ir.Node) -> bool:
    """Sizes are integers, or float scalars on the way; longer float vectors are parameters."""
    values = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
    return all(value.const_value is not None and value.const_value.size == 1 for value in values)


def merged_shape(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> Shape | None:
    """The dimensions that agree at both batch sizes; None where they differ.

    >>> merged_shape((2, 512), (3, 512))
    (None, 512)
    """
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(a if a == b else None for a, b in zip(first, second, strict=True))


def settle_shapes(model: ir.Model) -> list[str]:
    """Make every Reshape target and other shape input constant, -1 standing for the batch.

    Afterwards every value carries its shape, the batch axis named "batch". Returns what was changed.

    Raises ConversionError naming the nodes whose shapes depend on more than the batch size.
    """
    low, high = (trace(model, size) for size in _SIZES)
    changes = [text for node in nodes_of(model.graph, "Reshape") for text in _settle_reshape(node, low, high)]
    changes += [text for node in nodes_of(model.graph, "Expand") for text in _settle_expand(node, low, high)]
    changes += [text for node in nodes_of(model.graph, "Resize") for text in _settle_resize(node, low, high)]
    changes += _settle_inputs(model.graph, low, high)
    remove_unused(model)
    _annotate(model.graph, low, high)
    _check_settled(model.graph)
    return changes


def _settle_reshape(node: ir.Node, low: Trace, high: Trace) -> list[str]:
    name = name_of(node.outputs[0])
    merged = merged_shape(low.shapes.get(name), high.shapes.get(name))
    if merged is None or merged.count(None) > 1:
        return []
    target = np.array([-1 if d is None else d for d in merged], np.int64)
    node.attributes.pop("allowzero", None)
    return _connect(node, 1, target, f"{name}_shape")


def _settle_expand(node: ir.Node, low: Trace, high: Trace) -> list[str]:
    """A batch that the input has is no axis to repeat: 1 in the target."""
    names = (name_of(need(node.inputs[0])), name_of(node.outputs[0]))
    given, merged = (merged_shape(low.shapes.get(name), high.shapes.get(name)) for name in names)
    if given is None or merged is None or len(given) > len(merged) or merged.count(None) > 1:
        return []
    aligned = (*(1 for _ in range(len(merged) - len(given))), *given)
    if any(wide is None and own is not None for wide, own in zip(merged, aligned, strict=True)):
        return []
    return _connect(node, 1, np.array([1 if d is None else d for d in merged], np.int64), f"{names[1]}_shape")


def _settle_resize(node: ir.Node, low: Trace, high: Trace) -> list[str]:
    """Sizes computed from the batch's too are those of the other axes alone."""
    sizes, name = input_at(node, 3), name_of(node.outputs[0])
    merged = merged_shape(low.shapes.get(name), high.shapes.get(name))
    if sizes is None or array(sizes) is not None or merged is None or None in merged[1:] or "axes" in node.attributes:
        return []
    node.attributes["axes"] = ir.AttrInt64s("axes", list(range(1, len(merged))))
    return _connect(node, 3, np.array(merged[1:], np.int64), f"{name}_sizes")


def _settle_inputs(graph: ir.Graph, low: Trace, high: Trace) -> list[str]:
    """Connect constants where integers computed from shapes turn out to be the same for every batch.

    Integers only: weights that a graph computes from parameters (adapters) must stay computed.
    """
    changes = []
    for node in list(graph):
        if name_of(node.outputs[0]) in low.constants:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or array(value) is not None:
                continue
            one, two = low.constants.get(name_of(value)), high.constants.get(name_of(value))
            if one is not None and two is not None and one.dtype.kind == "i" and np.array_equal(one, two):
                changes += _connect(node, index, one, f"{name_of(node.outputs[0])}_input{index}")
    return changes


def _connect(node: ir.Node, index: int, content: Array, name: str) -> list[str]:
    present = array(node.inputs[index])
    if present is not None and np.array_equal(present, content):
        return []
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    set_input(node, index, constant(graph, unique_name(name, value_names(graph)), content))
    return [f"{describe(node)}: input {index} is the constant {content.tolist()}"]


def _annotate(graph: ir.Graph, low: Trace, high: Trace) -> None:
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        name = name_of(value)
        one, two = low.shapes.get(name), high.shapes.get(name)
        merged = merged_shape(one, two)
        value.shape = None
        if merged is not None and one is not None:
            value.shape = ir.Shape([_dimension(*pair) for pair in zip(merged, one, strict=True)])
        value.type = low.types.get(name, value.type)


def _dimension(dim: int | None, at_low: int) -> int | str | None:
    """A size, "batch", or unknown for what grows with the batch in another way."""
    if dim is not None:
        return dim
    return BATCH if at_low == _SIZES[0] else None


def _check_settled(graph: ir.Graph) -> None:
    problems = [
        f"{describe(node)}: the target shape is computed from {name_of(node.inputs[1])!r}"
        for node in nodes_of(graph, "Reshape")
        if array(node.inputs[1]) is None
    ]
    problems += [
        f"{describe(node)}: the shape of its output {name_of(node.outputs[0])!r} cannot be inferred"
        for node in nodes_of(graph, "Conv", "Gemm", "MatMul", "BatchNormalization")
        if node.outputs[0].shape is None
    ]
    if problems:
        advice = "shapes may depend on the batch size only; export the model again for one input size:"
        raise ConversionError(listed(advice, problems))


def fix_image_size(model: ir.Model, size: tuple[int, ...]) -> list[str]:
    """Give the input's spatial axes the sizes ``size``, (height, width), where the file leaves them open, in place.

    Returns what was changed.

    Raises ConversionError if the file fixes other sizes.
    """
    image = model.graph.inputs[0]
    dims = list(image.shape or ())
    open_axes = [axis for axis in range(2, len(dims)) if not isinstance(dims[axis], int)]
    wanted = [*dims[:2], *(size[axis - 2] if axis in open_axes else dims[axis] for axis in range(2, len(dims)))]
    if len(dims) != len(size) + 2 or wanted[2:] != list(size):
        raise ConversionError(f"input {image.name!r} has shape {image.shape}, which is not of size {size}")
    image.shape = ir.Shape(wanted)
    return [f"input {image.name!r}: its size was open, it is {size} now"] if open_axes else []


def free_batch(model: ir.Model) -> list[str]:
    """Give the first axis of the input the name "batch"; Reshape targets that hold a fixed batch get -1.

    Returns what was changed. Whether a fixed batch was truly just a batch, only running it can tell: see
    `lorac_exporters.batch_check`.
    """
    image = model.graph.inputs[0]
    dims = list(image.shape or ())
    first, dims[0] = dims[0], ir.SymbolicDim(BATCH)
    changes = _free_reshapes(model, first) if isinstance(first, int) else []
    image.shape = ir.Shape(dims)
    if isinstance(first, int):
        changes.insert(0, f"input {image.name!r}: the batch was fixed to {first}, it is free now")
    elif first.value != BATCH:
        changes.insert(0, f"input {image.name!r}: the batch axis {first.value!r} is called {BATCH!r} now")
    return changes


def _free_reshapes(model: ir.Model, batch: int) -> list[str]:
    fixed = trace(model, batch)
    changes = []
    for node in nodes_of(model.graph, "Reshape"):
        before = fixed.shapes.get(name_of(node.inputs[0]))
        after = fixed.shapes.get(name_of(node.outputs[0]))
        if before and after and before[0] == after[0] == batch and math.prod(after) > 0:
            target: npt.NDArray[np.int64] = np.array([-1, *after[1:]], np.int64)
            node.attributes.pop("allowzero", None)
            changes += _connect(node, 1, target, f"{name_of(node.outputs[0])}_shape")
    return changes
