"""Gemm and MatMul: FULLY_CONNECTED where one side is a constant weight, else BATCH_MATMUL; and Flatten before them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, float_attribute, input_at, int_attribute, name_of, need
from lorac_exporters.tflite import shaping
from lorac_exporters.tflite.arranging import operand
from lorac_exporters.tflite.flattening import flattened_from, keeps_stored_order, stored_order
from lorac_exporters.tflite.lowering import Lowering, Rule, need_array, plain
from lorac_exporters.tflite.network import Array, Network, Operator, Option, Tensor

_NO_ACTIVATION: dict[str, Option] = {"fused_activation_function": "NONE"}


def gemm(lowering: Lowering, node: ir.Node) -> None:
    """Gemm of a computed matrix: alpha * (x @ w) + beta * c.

    Raises ConversionError if the batch would not stay the first axis.
    """
    if int_attribute(node, "transA", 0):
        raise lowering.refuse(node, "it transposes its first input (transA), which moves the batch")
    transposed = bool(int_attribute(node, "transB", 0))
    alpha = float_attribute(node, "alpha", 1.0)
    if array(node.inputs[0]) is not None:
        raise lowering.refuse(node, f"its first input {name_of(node.inputs[0])!r} is a constant")
    bias = input_at(node, 2)
    if array(node.inputs[1]) is None:
        if alpha != 1 or bias is not None:
            raise lowering.refuse(node, "of two computed matrices it can do the product only (alpha 1, no third input)")
        batch_matmul(lowering, node, transposed=transposed)
        return
    weight = _weight(lowering, node, transposed=transposed, factor=alpha)
    added = _bias(lowering, node, weight.shape[0])
    if bias is None or added is not None:
        inputs = [lowering.stored(node.inputs[0], (0, 1)).tensor, weight, added]
        lowering.emit_for("FULLY_CONNECTED", inputs, node.outputs[0], (0, 1), options=_NO_ACTIVATION)
        return
    _add_matrix(lowering, node, weight)


def matmul(lowering: Lowering, node: ir.Node) -> None:
    """MatMul; with a constant matrix on the right it is a fully connected layer over the last axis."""
    ranks = [len(lowering.dims(value)) for value in node.inputs]
    if min(ranks) < 2:
        raise lowering.refuse(node, "one of its inputs is a vector, expected matrices")
    if array(node.inputs[1]) is None or array(node.inputs[0]) is not None or ranks[1] != 2:
        batch_matmul(lowering, node, transposed=False)
        return
    data = lowering.stored(node.inputs[0], plain(ranks[0])).tensor
    options = _NO_ACTIVATION | ({"keep_num_dims": True} if ranks[0] > 2 else {})
    inputs = [data, _weight(lowering, node, transposed=False), None]
    lowering.emit_for("FULLY_CONNECTED", inputs, node.outputs[0], plain(ranks[0]), options=options)


def batch_matmul(lowering: Lowering, node: ir.Node, *, transposed: bool) -> None:
    """The product of the last two axes; ``transposed``: those of the second operand are swapped first."""
    left, swapped_left = _factor(lowering, node.inputs[0])
    right, swapped_right = _factor(lowering, node.inputs[1])
    options: dict[str, Option] = {"adj_x": swapped_left, "adj_y": swapped_right != transposed}
    rank = len(lowering.dims(node.outputs[0]))
    lowering.emit_for("BATCH_MATMUL", [left, right], node.outputs[0], plain(rank), options=options)


def flatten(lowering: Lowering, node: ir.Node) -> None:
    """Flatten and Reshape; in front of fully connected layers the numbers stay in the order in which they lie."""
    if not keeps_stored_order(node):
        shaping.reshape(lowering, node)
        return
    output = node.outputs[0]
    tensor = lowering.stored(node.inputs[0], stored_order(lowering, node)).tensor
    batch, size = lowering.dims(output)
    target = lowering.ints(f"{name_of(output)}_shape", (-1 if lowering.has_batch(output) else batch, size))
    lowering.emit_for("RESHAPE", [tensor, target], output, (0, 1))


def join_biases(network: Network) -> None:
    """FULLY_CONNECTED without bias, then ADD of a constant vector: the vector becomes the bias."""
    for operator in list(network.operators):
        add = _bias_after(network, operator)
        if add is None:
            continue
        made = operator.outputs[0]
        operator.inputs[2] = next(t for t in add.inputs if t is not made)
        operator.outputs = add.outputs
        operator.options["fused_activation_function"] = add.options.get("fused_activation_function", "NONE")
        network.operators.remove(add)


def _bias_after(network: Network, operator: Operator) -> Operator | None:
    if operator.kind != "FULLY_CONNECTED" or operator.inputs[2] is not None:
        return None
    made = operator.outputs[0]
    users = [user for user, _ in network.users(made)]
    if made in network.outputs or len(users) != 1 or users[0].kind != "ADD":
        return None
    others = [t for t in users[0].inputs if t is not None and t is not made]
    fits = len(others) == 1 and others[0].data is not None and others[0].shape == made.shape[-1:]
    return users[0] if fits and users[0].outputs[0].shape == made.shape else None


def _weight(lowering: Lowering, node: ir.Node, *, transposed: bool, factor: float = 1.0) -> Tensor:
    """(out, in), the columns in the order in which the input lies; ``transposed``: ONNX has it as (out, in) too."""
    weight = need(node.inputs[1])
    rows, columns = lowering.dims(weight)
    out, size = (rows, columns) if transposed else (columns, rows)
    origin = flattened_from(lowering, node.inputs[0])
    inner, order = ((size,), (0,)) if origin is None else (origin[0][1:], tuple(a - 1 for a in origin[1][1:]))
    view = (out, *inner) if transposed else (*inner, out)
    permute = (0, *(axis + 1 for axis in order)) if transposed else (len(inner), *order)
    if factor != 1:
        content = need_array(weight).reshape(view).transpose(permute).reshape(out, size) * np.float32(factor)
        return lowering.constant(f"{name_of(weight)}_scaled", content)
    return lowering.arranged(weight, view, permute, shape=(out, size), channel_axis=0 if transposed else 1)


def _bias(lowering: Lowering, node: ir.Node, channels: int) -> Tensor | None:
    """The third input of Gemm as a bias (out,); None if it is not one."""
    bias = input_at(node, 2)
    if bias is None or array(bias) is None:
        return None
    content = need_array(bias)
    if content.size not in (1, channels) or max(content.shape[:-1], default=1) > 1:
        return None
    beta = float_attribute(node, "beta", 1.0)
    if beta == 1 and content.size == channels:
        return lowering.arranged(bias, (channels,), (0,))
    scaled: Array = np.broadcast_to(content.reshape(-1) * np.float32(beta), (channels,)).astype(np.float32)
    return lowering.constant(f"{name_of(bias)}_scaled", np.ascontiguousarray(scaled))


def _add_matrix(lowering: Lowering, node: ir.Node, weight: Tensor) -> None:
    """Gemm whose third input is no bias: product, then sum."""
    if float_attribute(node, "beta", 1.0) != 1:
        raise lowering.refuse(node, "beta other than 1 with a third input that is not a constant vector")
    output = node.outputs[0]
    inputs = [lowering.stored(node.inputs[0], (0, 1)).tensor, weight, None]
    batch = 0 if lowering.has_batch(output) else None
    name, shape = f"{name_of(output)}_product", lowering.dims(output)
    made = lowering.emit("FULLY_CONNECTED", inputs, shape, name=name, options=_NO_ACTIVATION, batch_axis=batch)
    added = operand(lowering, need(node.inputs[2]), (0, 1))
    lowering.emit_for("ADD", [made, added], output, (0, 1), options=_NO_ACTIVATION)


def _factor(lowering: Lowering, value: ir.Value | None) -> tuple[Tensor, bool]:
    """An operand of BATCH_MATMUL, and whether its last two axes lie swapped."""
    rank = len(lowering.dims(value))
    order = plain(rank)
    swapped = (*order[:-2], rank - 1, rank - 2)
    if array(value) is None and lowering.stored(value).layout == swapped:
        return lowering.stored(value).tensor, True
    return lowering.stored(value, order).tensor, False


RULES: dict[str, Rule] = {"Flatten": flatten, "Gemm": gemm, "MatMul": matmul, "Reshape": flatten}
