"""Gradient rules: Activation functions.

At kinks the gradients are PyTorch's. Where the output tells what the input was, the output is used: the input then
need not be kept, and onnxruntime may fuse the activation into the layer before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.elementwise import as_number, indicator, unbroadcast
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Dim, Tape, dims
from lorac_exporters.graph_tools import array, describe, float_attribute, int_attribute, need
from lorac_runtime.errors import ConversionError

Gradients = Sequence["ir.Value | None"]

# Selu's constants in the ONNX standard.
_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

_INSIDE = {1: "Greater", 2: "Less"}  # what an output is of its lower bound (input 1) and upper bound (input 2)
_BELOW_3 = float(np.nextafter(np.float32(3), np.float32(0)))


def _times(slope: Callable[[Tape, Site], ir.Value]) -> Rule:
    """The rule of a function of one input, given its derivative (in the shape of the input)."""
    return lambda tape, site: [tape.op("Mul", site.grad, slope(tape, site), like=site.x)]


def _relu(tape: Tape, site: Site) -> ir.Value:
    return indicator(tape, "Greater", site.y, 0.0)


def _leaky_relu(tape: Tape, site: Site) -> ir.Value:
    slope = float_attribute(site.node, "alpha", 0.01)
    # a negative slope makes outputs positive on both sides of 0
    above = indicator(tape, "Greater", site.y if slope >= 0 else site.x, 0.0)
    if 0 <= slope <= 1:
        return tape.op("Clip", above, slope, 1.0, like=site.x)
    return _plus(tape, _scaled(tape, above, 1 - slope), slope)


def _prelu(tape: Tape, site: Site) -> Gradients:
    """x above zero, slope * x below; the slope is broadcast to the shape of x."""
    slope = need(site.input(1))
    found: list[ir.Value | None] = [None, None]
    if site.wants(0):
        step = tape.op("Sub", 1.0, slope, like=slope)
        above = tape.op("Mul", indicator(tape, "Greater", site.x, 0.0), step, like=site.x)
        found[0] = tape.op("Mul", site.grad, tape.op("Add", above, slope, like=site.x), like=site.x)
    if site.wants(1):
        below = tape.op("Min", site.x, 0.0, like=site.x)
        found[1] = unbroadcast(tape, tape.op("Mul", site.grad, below, like=site.x), slope)
    return found


def _clip(tape: Tape, site: Site) -> Gradients:
    """The gradient passes strictly between the bounds, as through torch's ReLU6 and Hardtanh.

    It is read off the output: the input need not be kept, and engines may fuse Clip with what computes it.
    """
    bounds = {i: value for i, value in enumerate(site.node.inputs) if i > 0 and value is not None}
    if any(array(bound) is None or site.wants(i) for i, bound in bounds.items()):
        raise ConversionError(
            f"{describe(site.node)} has bounds that are computed or trained; only constant bounds have a gradient "
            "rule: make the bounds constants, or train fewer layers"
        )
    absent = [None] * (len(site.node.inputs) - 1)
    if not bounds:
        return [site.grad, *absent]
    kind, y = ir.DataType.BOOL, site.y
    inside = [tape.op(_INSIDE[i], y, bound, like=y, dtype=kind) for i, bound in bounds.items()]
    kept = functools.reduce(lambda one, other: tape.op("And", one, other, like=y, dtype=kind), inside)
    return [tape.op("Mul", site.grad, as_number(tape, kept), like=site.x), *absent]


def _sigmoid(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Mul", site.y, tape.op("Sub", 1.0, site.y, like=site.y), like=site.y)


def _hard_sigmoid(tape: Tape, site: Site) -> ir.Value:
    """alpha strictly between the bounds."""
    kind, y = ir.DataType.BOOL, site.y
    above, below = tape.op("Greater", y, 0.0, like=y, dtype=kind), tape.op("Less", y, 1.0, like=y, dtype=kind)
    inside = as_number(tape, tape.op("And", above, below, like=y, dtype=kind))
    return _scaled(tape, inside, float_attribute(site.node, "alpha", 0.2))


def _hard_swish(tape: Tape, site: Site) -> ir.Value:
    """h(x) + x / 6 strictly between -3 and 3, h(x) elsewhere, where h(x) = clip(x / 6 + 1/2, 0, 1).

    ThresholdedRelu is x above its bound and 0 below, so the difference of two is x between their bounds.
    """
    # onnxruntime computes HardSwish as x * h(x) and finds that this h(x) is the same
    gate = tape.op("HardSigmoid", site.x, like=site.x, attributes={"alpha": 1 / 6, "beta": 0.5})
    over = [tape.op("ThresholdedRelu", site.x, like=site.x, attributes={"alpha": b}) for b in (-3.0, _BELOW_3)]
    inner = tape.op("Sub", *over, like=site.x)
    return tape.op("Add", gate, _scaled(tape, inner, 1 / 6), like=site.x)


def _tanh(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Sub", 1.0, tape.op("Mul", site.y, site.y, like=site.y), like=site.y)


def _elu(tape: Tape, site: Site) -> ir.Value:
    return _exponential(tape, site, 1.0, _positive(site, "alpha", 1.0))


def _selu(tape: Tape, site: Site) -> ir.Value:
    gamma = _positive(site, "gamma", _SELU_GAMMA)
    return _exponential(tape, site, gamma, gamma * _positive(site, "alpha", _SELU_ALPHA))


def _celu(tape: Tape, site: Site) -> ir.Value:
    """1 above zero, y / alpha + 1 below."""
    alpha = _positive(site, "alpha", 1.0)
    below = tape.op("Min", site.y, 0.0, like=site.y)
    return _plus(tape, below if alpha == 1 else _scaled(tape, below, 1 / alpha), 1.0)


def _exponential(tape: Tape, site: Site, above: float, below: float) -> ir.Value:
    """``above`` where y > 0, y + ``below`` elsewhere: the slope of ``below`` * (exp(x) - 1), in terms of y."""
    slope = _plus(tape, tape.op("Min", site.y, 0.0, like=site.y), below)
    if above == below:
        return slope
    step = _scaled(tape, indicator(tape, "Greater", site.y, 0.0), above - below)
    return tape.op("Add", slope, step, like=site.y)


def _positive(site: Site, name: str, default: float) -> float:
    """An attribute that must be above 0, so that the sign of the output is the sign of the input."""
    number = float_attribute(site.node, name, default)
    if number <= 0:
        raise ConversionError(
            f"{describe(site.node)} has {name} = {number}; only values above 0 have a gradient rule: "
            "replace the activation, or train fewer layers"
        )
    return number


def _softplus(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Sigmoid", site.x, like=site.x)


def _softsign(tape: Tape, site: Site) -> ir.Value:
    """1 / (1 + |x|)^2 = (1 - |y|)^2."""
    root = tape.op("Sub", 1.0, tape.op("Abs", site.y, like=site.y), like=site.y)
    return tape.op("Mul", root, root, like=site.y)


def _mish(tape: Tape, site: Site) -> ir.Value:
    """t + x * sigmoid(x) * (1 - t^2) with t = tanh(softplus(x))."""
    x = site.x
    gate = tape.op("Tanh", tape.op("Softplus", x, like=x), like=x)
    rest = tape.op("Sub", 1.0, tape.op("Mul", gate, gate, like=x), like=x)
    swish = tape.op("Mul", x, tape.op("Sigmoid", x, like=x), like=x)
    return tape.op("Add", gate, tape.op("Mul", swish, rest, like=x), like=x)


def _thresholded_relu(tape: Tape, site: Site) -> ir.Value:
    return indicator(tape, "Greater", site.x, float_attribute(site.node, "alpha", 1.0))


def _softmax(tape: Tape, site: Site) -> Gradients:
    """grad * y - y * sum(grad * y)."""
    weighted = tape.op("Mul", site.grad, site.y, like=site.y)
    share = tape.op("Mul", site.y, _axis_sum(tape, site, weighted), like=site.y)
    return [tape.op("Sub", weighted, share, like=site.y)]


def _log_softmax(tape: Tape, site: Site) -> Gradients:
    """grad - softmax(x) * sum(grad)."""
    softmax = tape.op("Exp", site.y, like=site.y)
    share = tape.op("Mul", softmax, _axis_sum(tape, site, site.grad), like=site.y)
    return [tape.op("Sub", site.grad, share, like=site.y)]


def _axis_sum(tape: Tape, site: Site, value: ir.Value) -> ir.Value:
    """The sum over the axis of a softmax, which is kept with size 1."""
    axis = int_attribute(site.node, "axis", -1)
    shape: list[Dim] = [*dims(value)]
    shape[axis] = 1
    return tape.op("ReduceSum", value, tape.ints(axis), shape=shape)


def _dropout(tape: Tape, site: Site) -> Gradients:
    """grad * mask / (1 - ratio) in training, grad in inference."""
    absent = [None] * (len(site.node.inputs) - 1)
    if not _constant(site, 2):
        return [site.grad, *absent]
    ratio = _constant(site, 1)
    kept = tape.op("Mul", site.grad, as_number(tape, _dropout_mask(tape, site)), like=site.x)
    scale = 1 / (1 - (0.5 if ratio is None else ratio))
    return [kept if scale == 1 else _scaled(tape, kept, scale), *absent]


def _constant(site: Site, index: int) -> float | None:
    """A scalar input as a number, None where it is left out. Raises ConversionError if it is computed."""
    value = site.input(index)
    if value is None:
        return None
    content = array(value)
    if content is None:
        raise ConversionError(
            f"{describe(site.node)} computes its input {index}; its gradient needs a constant: set the ratio and "
            "the training mode when the graph is made"
        )
    return float(content.item())


def _dropout_mask(tape: Tape, site: Site) -> ir.Value:
    """The second output of a Dropout node, added where it has none: which elements are kept."""
    node = site.node
    if len(node.outputs) < 2:
        node.resize_outputs(2)
    mask = node.outputs[1]
    mask.name = mask.name or tape.fresh("dropout_mask")
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(dims(site.x))
    return mask


def _scaled(tape: Tape, value: ir.Value, factor: float) -> ir.Value:
    return tape.op("Mul", value, factor, like=value)


def _plus(tape: Tape, value: ir.Value, term: float) -> ir.Value:
    return tape.op("Add", value, term, like=value)


RULES: dict[str, Rule] = {
    "Celu": _times(_celu),
    "Clip": _clip,
    "Dropout": _dropout,
    "Elu": _times(_elu),
    "HardSigmoid": _times(_hard_sigmoid),
    "HardSwish": _times(_hard_swish),
    "LeakyRelu": _times(_leaky_relu),
    "LogSoftmax": _log_softmax,
    "Mish": _times(_mish),
    "PRelu": _prelu,
    "Relu": _times(_relu),
    "Selu": _times(_selu),
    "Sigmoid": _times(_sigmoid),
    "Softmax": _softmax,
    "Softplus": _times(_softplus),
    "Softsign": _times(_softsign),
    "Tanh": _times(_tanh),
    "ThresholdedRelu": _times(_thresholded_relu),
}
