"""Gradient rules: Elementwise arithmetic, with broadcasting.

A rule writes the gradient in the shape of the output; `unbroadcast` brings it to the shape of an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import array, describe, name_of, need
from lorac_runtime.errors import ConversionError

Gradients = Sequence["ir.Value | None"]

_ERF_SLOPE = 2 / math.sqrt(math.pi)


def unbroadcast(tape: Tape, grad: ir.Value, target: ir.Value) -> ir.Value:
    """``grad`` summed over the axes along which ``target`` was repeated: a value with the shape of ``target``.

    Sizes with the same name are equal. Writes nothing where the shapes agree.

    Raises ConversionError where only the batch size at run time could say whether an axis was repeated.
    """
    extra = len(dims(grad)) - len(dims(target))
    repeated = _repeated(grad, target, extra)
    if not extra and not repeated:
        return grad
    axes = tape.ints(*range(extra), *(extra + axis for axis in repeated))
    if not extra:
        return tape.op("ReduceSum", grad, axes, like=target)
    kept = [d for axis, d in enumerate(dims(target)) if axis not in repeated]
    total = tape.op("ReduceSum", grad, axes, shape=kept, dtype=grad.dtype, attributes={"keepdims": 0})
    return tape.op("Unsqueeze", total, tape.ints(*repeated), like=target) if repeated else total


def _repeated(grad: ir.Value, target: ir.Value, extra: int) -> list[int]:
    """Axes of ``target`` of size 1 where ``grad``, which has ``extra`` more axes in front, is longer."""
    pairs = list(zip(dims(target), dims(grad)[extra:], strict=True))
    differing = [axis for axis, (own, full) in enumerate(pairs) if own != full or own is None]
    if any(pairs[axis][0] != 1 for axis in differing):
        raise ConversionError(
            f"{name_of(target)!r} has shape {dims(target)} and is broadcast to {dims(grad)}: which axes are repeated "
            "is known only at run time; give these axes constant sizes, or one name where they are equal"
        )
    return differing


def indicator(tape: Tape, comparison: str, value: ir.Value, other: ir.Value | float) -> ir.Value:
    """1.0 where the comparison holds and 0.0 elsewhere; ``other`` must broadcast to the shape of ``value``."""
    return as_number(tape, tape.op(comparison, value, other, like=value, dtype=ir.DataType.BOOL))


def as_number(tape: Tape, condition: ir.Value) -> ir.Value:
    """A truth value as 1.0 or 0.0 (float32)."""
    kind = ir.DataType.FLOAT
    return tape.op("Cast", condition, like=condition, dtype=kind, attributes={"to": int(kind)})


def _each(tape: Tape, site: Site, write: Callable[[int], ir.Value]) -> list[ir.Value | None]:
    """``write(i)``, the gradient in the shape of the output, brought to the shape of each wanted input."""
    return [
        unbroadcast(tape, write(i), need(value)) if site.wants(i) else None for i, value in enumerate(site.node.inputs)
    ]


def _unary(slope: Callable[[Tape, Site], ir.Value]) -> Rule:
    """The rule of an operator with one input, given the gradient of that input."""
    return lambda tape, site: [slope(tape, site)]


def _passed_on(tape: Tape, site: Site) -> Gradients:
    """Add, Sum and Identity."""
    return _each(tape, site, lambda _: site.grad)


def _sub(tape: Tape, site: Site) -> Gradients:
    right = need(site.input(1))
    left = unbroadcast(tape, site.grad, site.x) if site.wants(0) else None
    # after the sum, where there is less to negate
    return [left, _neg(tape, unbroadcast(tape, site.grad, right)) if site.wants(1) else None]


def _mul(tape: Tape, site: Site) -> Gradients:
    factors = need(site.input(1)), site.x
    return _each(tape, site, lambda i: tape.op("Mul", site.grad, factors[i], like=site.y))


def _div(tape: Tape, site: Site) -> Gradients:
    divisor = need(site.input(1))
    quotient = tape.op("Div", site.grad, divisor, like=site.y)
    numerator = unbroadcast(tape, quotient, site.x) if site.wants(0) else None
    if not site.wants(1):
        return [numerator, None]
    product = tape.op("Mul", quotient, site.y, like=site.y)
    return [numerator, _neg(tape, unbroadcast(tape, product, divisor))]


def _mean(tape: Tape, site: Site) -> Gradients:
    count = len(site.node.inputs)
    grad = site.grad if count == 1 else tape.op("Mul", site.grad, 1 / count, like=site.y)
    return _each(tape, site, lambda _: grad)


def _extreme(tape: Tape, site: Site) -> Gradients:
    """Min and Max: inputs that tie share the gradient evenly."""
    if len(site.node.inputs) == 1:
        return [site.grad]
    chosen = [indicator(tape, "Equal", site.y, need(value)) for value in site.node.inputs]
    ties = tape.op("Sum", *chosen, like=site.y)
    share = tape.op("Div", site.grad, ties, like=site.y)
    return _each(tape, site, lambda i: tape.op("Mul", share, chosen[i], like=site.y))


def _where(tape: Tape, site: Site) -> Gradients:
    chosen = tape.op("Mul", site.grad, as_number(tape, site.x), like=site.y)
    parts = [chosen, tape.op("Sub", site.grad, chosen, like=site.y) if site.wants(2) else None]
    return _each(tape, site, lambda i: need(parts[i - 1]))


def _pow(tape: Tape, site: Site) -> Gradients:
    exponent = _constant_exponent(site)
    if exponent.size == 1 and exponent.item() == 1:
        return [unbroadcast(tape, site.grad, site.x), None]
    if exponent.size == 1 and exponent.item() == 2:
        slope = tape.op("Mul", site.x, 2.0, like=site.x)
    else:
        # an exponent of 0 must not become -1: that is infinite at 0, where the slope is 0
        lower = tape.constant(np.where(exponent == 0, 0, exponent - 1).astype(np.float32))
        slope = tape.op("Mul", tape.op("Pow", site.x, lower, like=site.y), tape.constant(exponent), like=site.y)
    return [unbroadcast(tape, tape.op("Mul", site.grad, slope, like=site.y), site.x), None]


def _constant_exponent(site: Site) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    exponent = array(site.input(1))
    if exponent is None or site.wants(1):
        raise ConversionError(
            f"{describe(site.node)} has an exponent that is computed or trained; only constant exponents have a "
            "gradient rule: make the exponent a constant, or train fewer layers"
        )
    return exponent.astype(np.float32)


def _neg(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("Neg", value, like=value)


def _abs(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Mul", site.grad, tape.op("Sign", site.x, like=site.x), like=site.x)


def _sqrt(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Div", tape.op("Mul", site.grad, 0.5, like=site.x), site.y, like=site.x)


def _exp(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Mul", site.grad, site.y, like=site.x)


def _log(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Div", site.grad, site.x, like=site.x)


def _reciprocal(tape: Tape, site: Site) -> ir.Value:
    square = tape.op("Mul", site.y, site.y, like=site.x)
    return _neg(tape, tape.op("Mul", site.grad, square, like=site.x))


def _erf(tape: Tape, site: Site) -> ir.Value:
    """grad * 2 / sqrt(pi) * exp(-x^2)."""
    exponent = _neg(tape, tape.op("Mul", site.x, site.x, like=site.x))
    bell = tape.op("Mul", tape.op("Exp", exponent, like=site.x), _ERF_SLOPE, like=site.x)
    return tape.op("Mul", site.grad, bell, like=site.x)


def _sin(tape: Tape, site: Site) -> ir.Value:
    return tape.op("Mul", site.grad, tape.op("Cos", site.x, like=site.x), like=site.x)


def _cos(tape: Tape, site: Site) -> ir.Value:
    return _neg(tape, tape.op("Mul", site.grad, tape.op("Sin", site.x, like=site.x), like=site.x))


def _atan(tape: Tape, site: Site) -> ir.Value:
    """grad / (1 + x^2)."""
    square = tape.op("Mul", site.x, site.x, like=site.x)
    return tape.op("Div", site.grad, tape.op("Add", square, 1.0, like=site.x), like=site.x)


def _cast(tape: Tape, site: Site) -> ir.Value:
    kind = site.x.dtype
    if kind is None or not kind.is_floating_point():
        raise ConversionError(f"{describe(site.node)} casts from {kind}; only casts between floats have a gradient")
    if kind == site.y.dtype:
        return site.grad
    return tape.op("Cast", site.grad, like=site.x, attributes={"to": int(kind)})


RULES: dict[str, Rule] = {
    "Abs": _unary(_abs),
    "Add": _passed_on,
    "Atan": _unary(_atan),
    "Cast": _unary(_cast),
    "Cos": _unary(_cos),
    "Div": _div,
    "Erf": _unary(_erf),
    "Exp": _unary(_exp),
    "Identity": _passed_on,
    "Log": _unary(_log),
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mul": _mul,
    "Neg": _unary(lambda tape, site: _neg(tape, site.grad)),
    "Pow": _pow,
    "Reciprocal": _unary(_reciprocal),
    "Sin": _unary(_sin),
    "Sqrt": _unary(_sqrt),
    "Sub": _sub,
    "Sum": _passed_on,
    "Where": _where,
}
