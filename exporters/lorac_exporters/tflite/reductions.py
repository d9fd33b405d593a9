"""Means, sums and extremes over axes, and global pooling, which is one of them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, int_attribute, ints_attribute, name_of
from lorac_exporters.tflite.lowering import Layout, Lowering, Rule
from lorac_exporters.tflite.network import Network, Operator, Tensor

# ONNX operator -> what is done to each element before, the TFLite operator, what is done to the result.
_FORMS: dict[str, tuple[str | None, str, str | None]] = {
    "ReduceMean": (None, "MEAN", None),
    "ReduceSum": (None, "SUM", None),
    "ReduceMax": (None, "REDUCE_MAX", None),
    "ReduceMin": (None, "REDUCE_MIN", None),
    "ReduceProd": (None, "REDUCE_PROD", None),
    "ReduceL1": ("ABS", "SUM", None),
    "ReduceL2": ("SQUARE", "SUM", "SQRT"),
    "ReduceSumSquare": ("SQUARE", "SUM", None),
    "ReduceLogSum": (None, "SUM", "LOG"),
}


def reduction(lowering: Lowering, node: ir.Node) -> None:
    """Reduce* over constant axes other than the batch."""
    axes = _axes(lowering, node)
    reduce(lowering, node, axes, keep=bool(int_attribute(node, "keepdims", 1)))


def global_pool(lowering: Lowering, node: ir.Node) -> None:
    """GlobalAveragePool and GlobalMaxPool: over all positions."""
    reduce(lowering, node, range(2, len(lowering.dims(node.inputs[0]))), keep=True)


def reduce(lowering: Lowering, node: ir.Node, axes: Sequence[int], *, keep: bool) -> None:
    """Write the reduction of a node over these ONNX axes, wherever they are stored.

    Raises ConversionError if the batch is among them.
    """
    if 0 in axes and lowering.has_batch(node.inputs[0]):
        raise lowering.refuse(node, "it works across the samples of a batch")
    before, kind, after = _FORMS.get(_POOLS.get(node.op_type, node.op_type), (None, "MEAN", None))
    found, output = lowering.stored(node.inputs[0]), node.outputs[0]
    data = found.tensor if before is None else _elementwise(lowering, before, found.tensor)
    layout = found.layout if keep else remaining(found.layout, axes)
    stored_axes = sorted(found.layout.index(axis) for axis in axes)
    inputs = [data, lowering.ints(f"{name_of(output)}_axes", stored_axes)]
    options = {"keep_dims": keep}
    if after is None:
        lowering.emit_for(kind, inputs, output, layout, options=options)
        return
    shape = [lowering.dims(output)[axis] for axis in layout]
    batch = layout.index(0) if lowering.has_batch(output) else None
    made = lowering.emit(kind, inputs, shape, name=f"{name_of(output)}_sum", options=options, batch_axis=batch)
    lowering.emit_for(after, [made], output, layout)


def remaining(layout: Layout, axes: Sequence[int]) -> Layout:
    """The order of the axes that are left, numbered anew.

    >>> remaining((0, 2, 3, 1), (1,))
    (0, 1, 2)
    >>> remaining((0, 2, 3, 1), (2,))
    (0, 2, 1)
    """
    left = [axis for axis in layout if axis not in axes]
    return tuple(sorted(left).index(axis) for axis in left)


def join_squeezes(network: Network) -> None:
    """A reduction that keeps its axes, followed by an operator that only removes them, is one that does not."""
    for operator in list(network.operators):
        squeeze = _squeeze_after(network, operator)
        if squeeze is not None:
            operator.options["keep_dims"] = False
            operator.outputs = squeeze.outputs
            network.operators.remove(squeeze)


def _squeeze_after(network: Network, operator: Operator) -> Operator | None:
    if not operator.options.get("keep_dims") or operator.kind not in {kind for _, kind, _ in _FORMS.values()}:
        return None
    made, axes = operator.outputs[0], operator.inputs[1]
    users = [user for user, _ in network.users(made)]
    if made in network.outputs or len(users) != 1 or users[0].kind not in ("RESHAPE", "SQUEEZE"):
        return None
    gone = set() if axes is None or axes.data is None else set(axes.data.tolist())
    left = tuple(size for axis, size in enumerate(made.shape) if axis not in gone)
    return users[0] if users[0].outputs[0].shape == left else None


def _axes(lowering: Lowering, node: ir.Node) -> tuple[int, ...]:
    """The axes of a Reduce node, counted from the front; all of them if it names none."""
    rank = len(lowering.dims(node.inputs[0]))
    axes: Sequence[int] = ints_attribute(node, "axes", ())
    if input_at(node, 1) is not None:
        numbers = array(node.inputs[1])
        if numbers is None:
            raise lowering.refuse(node, f"its axes {name_of(node.inputs[1])!r} are computed, expected constants")
        axes = [int(a) for a in numbers.ravel()]
    if not axes and int_attribute(node, "noop_with_empty_axes", 0):
        raise lowering.refuse(node, "it reduces nothing (noop_with_empty_axes)")
    return tuple(sorted(axis % rank for axis in axes)) or tuple(range(rank))


def _elementwise(lowering: Lowering, kind: str, data: Tensor) -> Tensor:
    name = f"{data.name}_{kind.lower()}"
    return lowering.emit(kind, [data], data.shape, name=name, batch_axis=data.batch_axis)


_POOLS = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}
RULES: dict[str, Rule] = {**dict.fromkeys(_FORMS, reduction), **dict.fromkeys(_POOLS, global_pool)}
