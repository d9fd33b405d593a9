"""Normalisations over axes of each sample, on whatever order of axes is stored."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lorac_exporters.graph_tools import array, float_attribute, input_at, int_attribute, need
from lorac_exporters.tflite.arranging import constant_operand
from lorac_exporters.tflite.elementwise import BROADCAST_RANK, Pointwise, no_activation
from lorac_exporters.tflite.lowering import Lowering, Rule
from lorac_exporters.tflite.network import Tensor


def _layer_normalization(lowering: Lowering, node: ir.Node) -> None:
    """Over the axes from ``axis`` on, which the scale and the bias have too."""
    if any(output.uses() for output in node.outputs[1:]):
        raise lowering.refuse(node, "its mean or its deviation is used as an output")
    rank = len(lowering.dims(node.inputs[0]))
    axes = range(int_attribute(node, "axis", -1) % rank, rank)
    _normalize(lowering, node, axes, axes)


def _instance_normalization(lowering: Lowering, node: ir.Node) -> None:
    """Over the positions, for each sample and channel; a scale and a bias for each channel."""
    _normalize(lowering, node, range(2, len(lowering.dims(node.inputs[0]))), [1])


def _normalize(lowering: Lowering, node: ir.Node, axes: Iterable[int], affine: Iterable[int]) -> None:
    """(x - mean) / sqrt(var + eps) * scale + bias; statistics over ``axes``, scale and bias along ``affine``."""
    work = Pointwise(lowering, node)
    if len(work.x.shape) > BROADCAST_RANK:
        raise lowering.refuse(node, f"it has {len(work.x.shape)} axes, at most {BROADCAST_RANK} can be broadcast")
    scale = _along(work, need(node.inputs[1]), tuple(affine))
    shift = input_at(node, 2)
    bias = None if shift is None else _along(work, shift, tuple(affine))
    where = sorted(work.found.layout.index(axis) for axis in axes)
    centred = work.op("SUB", work.x, _mean(work, work.x, where))
    variance = _mean(work, work.op("MUL", centred, centred), where)
    lifted = _like(work, "ADD", variance, work.number(float_attribute(node, "epsilon", 1e-5)))
    unit = work.op("MUL", centred, _like(work, "RSQRT", lifted))
    if bias is None:
        work.finish("MUL", unit, scale)
    else:
        work.finish("ADD", work.op("MUL", unit, scale), bias)


def _along(work: Pointwise, value: ir.Value, axes: tuple[int, ...]) -> Tensor:
    """A scale or bias, laid along ``axes``."""
    numbers = array(value)
    if numbers is None:
        raise work.lowering.refuse(work.node, f"its input {value.name!r} is computed; give a constant")
    sizes = dict(zip(axes[len(axes) - numbers.ndim :], numbers.shape, strict=True))
    layout = work.found.layout
    return constant_operand(work.lowering, value, [sizes.get(axis, 1) for axis in range(len(layout))], layout)


def _mean(work: Pointwise, tensor: Tensor, where: list[int]) -> Tensor:
    """The mean over the stored axes ``where``, which stay as axes of size 1."""
    name = f"{work.node.outputs[0].name}_mean"
    shape = [1 if axis in where else size for axis, size in enumerate(tensor.shape)]
    inputs = [tensor, work.lowering.ints(f"{name}_axes", where)]
    return work.lowering.emit(
        "MEAN", inputs, shape, name=name, options={"keep_dims": True}, batch_axis=tensor.batch_axis
    )


def _like(work: Pointwise, kind: str, tensor: Tensor, *others: Tensor) -> Tensor:
    """An operator on statistics, in their shape."""
    name = f"{work.node.outputs[0].name}_{kind.lower()}"
    options = no_activation(kind)
    batch = tensor.batch_axis
    return work.lowering.emit(kind, [tensor, *others], tensor.shape, name=name, options=options, batch_axis=batch)


RULES: dict[str, Rule] = {
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
}
