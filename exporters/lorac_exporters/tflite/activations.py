"""Activations: one operator where TFLite has it, else written out in a few. Definitions: the ONNX operator list."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import array, float_attribute, input_at, int_attribute, need
from lorac_exporters.tflite.arranging import operand
from lorac_exporters.tflite.elementwise import BROADCAST_RANK, Pointwise, alias, unary
from lorac_exporters.tflite.lowering import Layout, Lowering, Rule
from lorac_exporters.tflite.network import Array, Tensor

_LARGEST = float(np.finfo(np.float32).max)
# Bounds that one operator has, and that fold into the operator before but for the last.
_CLIPS = {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1", (0.0, 1.0): "RELU_0_TO_1"}
# Selu's constants in the ONNX standard.
_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def _clip(lowering: Lowering, node: ir.Node) -> None:
    """Bounds that no operator has: RELU and MINIMUM, or MAXIMUM and MINIMUM."""
    low, high = _bound(lowering, node, 1, -np.inf), _bound(lowering, node, 2, np.inf)
    work = Pointwise(lowering, node)
    if (low, high) in _CLIPS:
        return work.finish(_CLIPS[low, high], work.x)
    if low == -np.inf and high == np.inf:
        return alias(lowering, node)
    if high == np.inf:
        return work.finish("MAXIMUM", work.x, low)
    if low == -np.inf:
        return work.finish("MINIMUM", work.x, high)
    raised = work.op("RELU", work.x) if low == 0.0 else work.op("MAXIMUM", work.x, low)
    return work.finish("MINIMUM", raised, high)


def _bound(lowering: Lowering, node: ir.Node, index: int, default: float) -> float:
    """A bound of Clip; the largest float stands for none."""
    value = input_at(node, index)
    if value is None:
        return default
    numbers = array(value)
    if numbers is None or numbers.size != 1:
        raise lowering.refuse(node, f"its bound {value.name!r} is computed; give a constant")
    bound = float(numbers.reshape(()))
    return default if abs(bound) >= _LARGEST else bound


def _leaky_relu(lowering: Lowering, node: ir.Node) -> None:
    work = Pointwise(lowering, node)
    work.finish("LEAKY_RELU", work.x, options={"alpha": float_attribute(node, "alpha", 0.01)})


def _prelu(lowering: Lowering, node: ir.Node) -> None:
    """Slopes are stored for every channel: XNNPACK in 2.14.0 answers wrongly, without a word, for a single one."""
    slope = need(node.inputs[1])
    if array(slope) is None:
        raise lowering.refuse(node, f"its slope {slope.name!r} is computed; give a constant")
    work = Pointwise(lowering, node)
    if len(work.x.shape) > BROADCAST_RANK:
        raise lowering.refuse(node, f"{len(work.x.shape)} axes, at most {BROADCAST_RANK} can be broadcast")
    slopes = operand(lowering, slope, work.found.layout)
    channels = work.x.shape[-1]
    if slopes.shape[-1] != channels:
        stored: Array = np.repeat(np.asarray(slopes.data), channels, axis=-1)
        slopes = lowering.constant(f"{slope.name}_repeated", stored)
    work.finish("PRELU", work.x, slopes)


def _elu(lowering: Lowering, node: ir.Node) -> None:
    alpha = float_attribute(node, "alpha", 1.0)
    work = Pointwise(lowering, node)
    if alpha == 1.0:
        return work.finish("ELU", work.x)
    return _exponential(work, alpha, 1.0)


def _selu(lowering: Lowering, node: ir.Node) -> None:
    alpha, gamma = float_attribute(node, "alpha", _SELU_ALPHA), float_attribute(node, "gamma", _SELU_GAMMA)
    _exponential(Pointwise(lowering, node), alpha, gamma)


def _exponential(work: Pointwise, alpha: float, gamma: float) -> None:
    """gamma * (x above zero, alpha * (exp(x) - 1) below); TFLite's ELU knows alpha 1 only."""
    below = work.op("MUL", work.op("ELU", work.op("MINIMUM", work.x, 0.0)), alpha * gamma)
    above = work.op("RELU", work.x)
    work.finish("ADD", above if gamma == 1.0 else work.op("MUL", above, gamma), below)


def _celu(lowering: Lowering, node: ir.Node) -> None:
    """x above zero, alpha * (exp(x / alpha) - 1) below."""
    alpha = float_attribute(node, "alpha", 1.0)
    work = Pointwise(lowering, node)
    inner = work.op("MUL", work.op("MINIMUM", work.x, 0.0), 1.0 / alpha)
    work.finish("ADD", work.op("RELU", work.x), work.op("MUL", work.op("ELU", inner), alpha))


def _hard_sigmoid(lowering: Lowering, node: ir.Node) -> None:
    """clip(alpha * x + beta, 0, 1), as relu6(6 * alpha * x + 6 * beta) / 6: RELU6 folds into the ADD."""
    alpha, beta = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    work = Pointwise(lowering, node)
    sixth = np.isclose(alpha, 1 / 6, rtol=1e-6)
    scaled = work.x if sixth else work.op("MUL", work.x, 6.0 * alpha)
    work.finish("MUL", work.op("RELU6", work.op("ADD", scaled, 6.0 * beta)), 1.0 / 6.0)


def _gelu(lowering: Lowering, node: ir.Node) -> None:
    attribute = node.attributes.get("approximate")
    approximate = attribute is not None and attribute.as_string() == "tanh"
    work = Pointwise(lowering, node)
    work.finish("GELU", work.x, options={"approximate": approximate})


def _softplus(lowering: Lowering, node: ir.Node) -> None:
    work = Pointwise(lowering, node)
    work.finish("ADD", *_softplus_terms(work))


def _softplus_terms(work: Pointwise) -> tuple[Tensor, Tensor]:
    """log(1 + exp(x)) = relu(x) + log(1 + exp(-|x|)): nothing overflows."""
    decay = work.op("EXP", work.op("NEG", work.op("ABS", work.x)))
    return work.op("RELU", work.x), work.op("LOG", work.op("ADD", decay, 1.0))


def _mish(lowering: Lowering, node: ir.Node) -> None:
    """x * tanh(softplus(x))."""
    work = Pointwise(lowering, node)
    work.finish("MUL", work.x, work.op("TANH", work.op("ADD", *_softplus_terms(work))))


def _softsign(lowering: Lowering, node: ir.Node) -> None:
    """x / (1 + |x|)."""
    work = Pointwise(lowering, node)
    work.finish("DIV", work.x, work.op("ADD", work.op("ABS", work.x), 1.0))


def _erf(lowering: Lowering, node: ir.Node) -> None:
    raise lowering.refuse(node, "TFLite has no Erf but in GELU, x / 2 * (1 + erf(x / sqrt(2)))")


def _softmax(kind: str) -> Rule:
    """Over one axis, which must be stored last."""

    def rule(lowering: Lowering, node: ir.Node) -> None:
        value, out = need(node.inputs[0]), node.outputs[0]
        axis = int_attribute(node, "axis", -1) % len(lowering.dims(value))
        if axis == 0 and lowering.has_batch(value):
            raise lowering.refuse(node, "it normalises over the batch")
        found = lowering.stored(value, last(lowering.stored(value).layout, axis))
        options = {"beta": 1.0} if kind == "SOFTMAX" else {}
        lowering.emit_for(kind, [found.tensor], out, found.layout, options=options)

    return rule


def last(layout: Layout, axis: int) -> Layout:
    """The layout with one axis moved to the end.

    >>> last((0, 1, 2, 3), 1)
    (0, 2, 3, 1)
    """
    return (*(other for other in layout if other != axis), axis)


RULES: dict[str, Rule] = {
    "Celu": _celu,
    "Clip": _clip,
    "Elu": _elu,
    "Erf": _erf,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": unary("HARD_SWISH"),
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _softmax("LOG_SOFTMAX"),
    "Mish": _mish,
    "PRelu": _prelu,
    "Relu": unary("RELU"),
    "Selu": _selu,
    "Sigmoid": unary("LOGISTIC"),
    "Softmax": _softmax("SOFTMAX"),
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Tanh": unary("TANH"),
}
