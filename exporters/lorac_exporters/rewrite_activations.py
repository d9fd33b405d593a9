"""Activations written out in Relu, Clip, Exp, Log, Tanh and arithmetic. Definitions: the ONNX operator list.

Each function returns the value that replaces the node's output, or None where no equal form is known. Exponents
are never positive, so nothing overflows.
"""

from __future__ import annotations

import onnx_ir as ir

from lorac_exporters.graph_tools import array, float_attribute, need
from lorac_exporters.rewrite_tape import Tape

# Selu's constants in the ONNX standard.
_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def hard_sigmoid(tape: Tape) -> ir.Value:
    """clip(alpha * x + beta, 0, 1)."""
    alpha = float_attribute(tape.node, "alpha", 0.2)
    return _clipped_line(tape, alpha, float_attribute(tape.node, "beta", 0.5))


def hard_swish(tape: Tape) -> ir.Value:
    """x * clip(x / 6 + 1/2, 0, 1)."""
    return tape.op("Mul", tape.x, _clipped_line(tape, 1 / 6, 0.5))


def elu(tape: Tape) -> ir.Value:
    """x above zero, alpha * (exp(x) - 1) below."""
    below = _exp_below(tape, 1.0, float_attribute(tape.node, "alpha", 1.0))
    return tape.op("Add", tape.op("Relu", tape.x), below)


def celu(tape: Tape) -> ir.Value:
    """x above zero, alpha * (exp(x / alpha) - 1) below."""
    alpha = float_attribute(tape.node, "alpha", 1.0)
    return tape.op("Add", tape.op("Relu", tape.x), _exp_below(tape, 1 / alpha, alpha))


def selu(tape: Tape) -> ir.Value:
    """gamma * (x above zero, alpha * (exp(x) - 1) below)."""
    alpha = float_attribute(tape.node, "alpha", _SELU_ALPHA)
    inner = tape.op("Add", tape.op("Relu", tape.x), _exp_below(tape, 1.0, alpha))
    return tape.op("Mul", inner, float_attribute(tape.node, "gamma", _SELU_GAMMA))


def prelu(tape: Tape) -> ir.Value | None:
    """x above zero, slope * x below."""
    slope = need(tape.node.inputs[1])
    if array(slope) is None:
        return None
    below = tape.op("Mul", slope, _negative_part(tape))
    return tape.op("Sub", tape.op("Relu", tape.x), below)


def softplus(tape: Tape) -> ir.Value:
    """log(1 + exp(x)) = relu(x) + log(1 + exp(-|x|))."""
    decay = tape.op("Exp", tape.op("Neg", tape.op("Abs", tape.x)))
    return tape.op("Add", tape.op("Relu", tape.x), tape.op("Log", tape.op("Add", decay, 1.0)))


def mish(tape: Tape) -> ir.Value:
    """x * tanh(softplus(x))."""
    return tape.op("Mul", tape.x, tape.op("Tanh", softplus(tape)))


def softsign(tape: Tape) -> ir.Value:
    """x / (1 + |x|)."""
    return tape.op("Div", tape.x, tape.op("Add", tape.op("Abs", tape.x), 1.0))


def thresholded_relu(tape: Tape) -> ir.Value:
    """x where x > alpha, else 0."""
    alpha = float_attribute(tape.node, "alpha", 1.0)
    above = tape.op("Greater", tape.x, alpha)
    above.type = ir.TensorType(ir.DataType.BOOL)
    return tape.op("Where", above, tape.x, 0.0)


def _clipped_line(tape: Tape, slope: float, offset: float) -> ir.Value:
    return tape.op("Clip", tape.op("Add", tape.op("Mul", tape.x, slope), offset), 0.0, 1.0)


def _negative_part(tape: Tape) -> ir.Value:
    """relu(-x), which is -x below zero and 0 above."""
    return tape.op("Relu", tape.op("Neg", tape.x))


def _exp_below(tape: Tape, inner: float, outer: float) -> ir.Value:
    """outer * (exp(inner * x) - 1) below zero, 0 above."""
    exponent = tape.op("Neg", tape.op("Mul", _negative_part(tape), inner))
    return tape.op("Mul", tape.op("Sub", tape.op("Exp", exponent), 1.0), outer)
