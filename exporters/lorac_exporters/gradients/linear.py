"""Gradient rules: Gemm and MatMul.

Transposes of matrices are flags of `Gemm`, which cost nothing; in front of a batched `MatMul` they are nodes of their
own, which engines fuse into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.gradients.elementwise import unbroadcast
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import describe, float_attribute, int_attribute, need
from lorac_runtime.errors import ConversionError


def gemm(tape: Tape, site: Site) -> Sequence[ir.Value | None]:
    """y = alpha * op(a) @ op(b) + beta * c, op transposing where transA or transB says so; c broadcasts."""
    a, b, c = site.x, need(site.node.inputs[1]), site.input(2)
    alpha, beta = (float_attribute(site.node, name, 1.0) for name in ("alpha", "beta"))
    turned_a, turned_b = (bool(int_attribute(site.node, name, 0)) for name in ("transA", "transB"))
    found = [
        _left_gradient(tape, site.grad, b, turned_a, turned_b, like=a, alpha=alpha) if site.wants(0) else None,
        _right_gradient(tape, site.grad, a, turned_a, turned_b, like=b, alpha=alpha) if site.wants(1) else None,
        _added_gradient(tape, site.grad, c, beta) if c is not None and site.wants(2) else None,
    ]
    return found[: len(site.node.inputs)]


def _left_gradient(
    tape: Tape, grad: ir.Value, b: ir.Value, turned_a: bool, turned_b: bool, *, like: ir.Value, alpha: float = 1.0
) -> ir.Value:
    """Of op(a): grad @ op(b)^T; of an ``a`` that is transposed: op(b) @ grad^T."""
    if turned_a:
        return _product(tape, b, grad, turned_b, True, like=like, alpha=alpha)
    return _product(tape, grad, b, False, not turned_b, like=like, alpha=alpha)


def _right_gradient(
    tape: Tape, grad: ir.Value, a: ir.Value, turned_a: bool, turned_b: bool, *, like: ir.Value, alpha: float = 1.0
) -> ir.Value:
    """Of op(b): op(a)^T @ grad; of a ``b`` that is transposed: grad^T @ op(a)."""
    if turned_b:
        return _product(tape, grad, a, True, turned_a, like=like, alpha=alpha)
    return _product(tape, a, grad, not turned_a, False, like=like, alpha=alpha)


def _product(
    tape: Tape, left: ir.Value, right: ir.Value, turn_left: bool, turn_right: bool, *, like: ir.Value, alpha: float
) -> ir.Value:
    attributes = {"transA": int(turn_left), "transB": int(turn_right), "alpha": alpha}
    return tape.op("Gemm", left, right, like=like, name="grad_gemm", attributes=attributes)


def _added_gradient(tape: Tape, grad: ir.Value, c: ir.Value, beta: float) -> ir.Value:
    reduced = unbroadcast(tape, grad, c)
    return reduced if beta == 1.0 else tape.op("Mul", reduced, beta, like=c)


def matmul(tape: Tape, site: Site) -> Sequence[ir.Value | None]:
    """y = a @ b; axes before the last two are batches and broadcast.

    Raises ConversionError if an operand is a vector.
    """
    a, b = site.x, need(site.node.inputs[1])
    if min(len(dims(a)), len(dims(b))) < 2:
        raise ConversionError(
            f"{describe(site.node)} multiplies a vector: shapes {dims(a)} and {dims(b)}, expected two matrices or "
            "batches of matrices; add an axis of size 1"
        )
    return [
        _left_of_matmul(tape, site.grad, b, like=a) if site.wants(0) else None,
        _right_of_matmul(tape, site.grad, a, like=b) if site.wants(1) else None,
    ]


def _left_of_matmul(tape: Tape, grad: ir.Value, b: ir.Value, *, like: ir.Value) -> ir.Value:
    """grad @ b^T, summed over the batches that ``a`` broadcasts to."""
    if len(dims(grad)) == 2:
        return _left_gradient(tape, grad, b, False, False, like=like)
    shape = (*dims(grad)[:-1], dims(like)[-1])
    return unbroadcast(tape, tape.op("MatMul", grad, _turned(tape, b), shape=shape, name="grad_matmul"), like)


def _right_of_matmul(tape: Tape, grad: ir.Value, a: ir.Value, *, like: ir.Value) -> ir.Value:
    """a^T @ grad, summed over the batches that ``b`` broadcasts to."""
    if len(dims(like)) == 2:
        return _right_gradient(tape, _rows(tape, grad), _rows(tape, a), False, False, like=like)
    shape = (*dims(grad)[:-2], dims(like)[-2], dims(grad)[-1])
    return unbroadcast(tape, tape.op("MatMul", _turned(tape, a), grad, shape=shape, name="grad_matmul"), like)


def _turned(tape: Tape, value: ir.Value) -> ir.Value:
    """The last two axes exchanged."""
    shape, last = dims(value), len(dims(value)) - 1
    perm = [*range(last - 1), last, last - 1]
    return tape.op("Transpose", value, shape=[shape[i] for i in perm], attributes={"perm": perm}, name="turned")


def _rows(tape: Tape, value: ir.Value) -> ir.Value:
    """(..., n) -> (rows, n): all axes but the last become one."""
    lead, (columns,) = dims(value)[:-1], sizes(value, -1)
    if len(lead) == 1:
        return value
    numbers = [d for d in lead if isinstance(d, int)]
    rows = math.prod(numbers) if len(numbers) == len(lead) else None
    return tape.op("Reshape", value, tape.ints(-1, columns), shape=(rows, columns))


RULES: dict[str, Rule] = {"Gemm": gemm, "MatMul": matmul}
