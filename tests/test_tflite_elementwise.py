"""Arithmetic, comparisons and functions of one tensor: the same numbers as onnxruntime, in the stored order of axes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, check, check_sources, graph, kinds, network_of, normal, positive

from lorac_exporters.tflite.lower import lower
from lorac_runtime.errors import ConversionError

ARITHMETIC = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5, 4), (3, 1, 1), (3, 5, 4), (1, 3, 1, 1), (1, 1, 5, 1)])
@pytest.mark.parametrize("op", ARITHMETIC)
def test_a_constant_of_any_broadcast_shape_costs_one_operator(op: str, shape: tuple[int, ...]) -> None:
    inputs = {"x": normal(1, 3, 5, 4), "c": positive(*shape, seed=1)}
    network = check(f"y = {op} (x, c)", inputs)
    assert kinds(network) == [ARITHMETIC[op]]


@pytest.mark.parametrize("op", ["Sub", "Div"])
def test_the_order_of_operands_is_kept(op: str) -> None:
    check(f"y = {op} (c, x)", {"x": positive(1, 3, 5, 4), "c": normal(3, 1, 1, seed=1)})


def test_constants_keep_their_names_and_can_be_written_anew() -> None:
    inputs = {"x": normal(1, 3, 5, 4), "scale": normal(3, 1, 1), "grid": normal(3, 5, 4)}
    found = check_sources(graph("s = Mul (x, scale) y = Add (s, grid)", inputs))
    assert {name: tensor.shape for name, tensor in found.items()} == {"scale": (3,), "grid": (5, 4, 3)}
    assert all(tensor.name == name for name, tensor in found.items())


def test_a_constant_used_in_two_orders_is_stored_in_both_and_knows_its_origin() -> None:
    inputs = {"x": normal(1, 4, 4, 4), "c": normal(4, 4, 4, seed=1)}
    body = (
        "t = Transpose <perm = [0, 3, 1, 2]> (x) a = Add (t, c) b = Transpose <perm = [0, 2, 3, 1]> (a) y = Mul (b, c)"
    )
    network = check(body, inputs)
    stored = [t for t in network.constants() if t.source is not None]
    assert {t.source.name for t in stored if t.source} == {"c"}
    assert len({t.name for t in stored}) == len(stored)


def test_a_scale_per_channel_computed_from_the_image_needs_no_transposition() -> None:
    body = "m = ReduceMean <keepdims = 1> (x, axes) s = Sigmoid (m) y = Mul (s, x)"
    network = check(body, {"x": normal(1, 3, 5, 4), "axes": np.array([2, 3])}, runtimes=EVERYWHERE)
    assert kinds(network) == ["MEAN", "LOGISTIC", "MUL"]


def test_a_vector_that_became_an_image_of_one_pixel_is_reshaped_only() -> None:
    body = "m = ReduceMean <keepdims = 0> (x, axes) s = Unsqueeze (m, axes) y = Mul (s, x)"
    network = check(body, {"x": normal(1, 3, 5, 4), "axes": np.array([2, 3])})
    assert kinds(network) == ["MEAN", "RESHAPE", "MUL"]


def test_operands_in_other_orders_are_transposed_once() -> None:
    body = "t = Transpose <perm = [0, 1, 3, 2]> (x) a = Add (x, t) b = Mul (x, t) y = Sub (a, b)"
    network = check(body, {"x": normal(1, 3, 4, 4)})
    assert sorted(kinds(network)) == ["ADD", "MUL", "SUB", "TRANSPOSE"]


def test_operands_that_lie_alike_under_other_axes_are_not_transposed() -> None:
    body = "t = Transpose <perm = [0, 2, 3, 1]> (x) r = Exp (t) a = Add (t, r) y = Transpose <perm = [0, 3, 1, 2]> (a)"
    assert kinds(check(body, {"x": normal(1, 3, 5, 4)})) == ["EXP", "ADD"]


def test_a_computed_operand_of_fewer_axes_and_no_batch() -> None:
    body = "e = Exp (c) y = Mul (x, e)"
    for shape in [(3, 1, 1), (5, 4), (3, 5, 4), (4,)]:
        check(body, {"x": normal(1, 3, 5, 4), "c": normal(*shape, seed=1)})


@pytest.mark.parametrize("op", [*ARITHMETIC, "Max", "Min", "Pow"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 1, 1, 1), (2, 3, 1, 1), (1, 3, 4, 1), (2, 3, 4, 5), (1,)])
def test_five_axes_are_broadcast_in_groups(op: str, shape: tuple[int, ...]) -> None:
    """Without XNNPACK, tflite-runtime 2.14.0 would die of most of these."""
    check(f"y = {op} (x, c)", {"x": positive(1, 2, 3, 4, 5), "c": positive(*shape, seed=1)}, runtimes=EVERYWHERE)


def test_more_steps_of_broadcasting_than_kernels_know_are_refused_by_name() -> None:
    inputs = {"x": normal(1, 2, 1, 4, 1), "c": normal(1, 3, 1, 5, seed=1)}
    with pytest.raises(ConversionError, match=r"Mul .* cannot be written to TFLite: it broadcasts .* in more than 4"):
        network_of("y = Mul (x, c)", inputs)


@pytest.mark.parametrize("op", ["Abs", "Ceil", "Cos", "Exp", "Floor", "Neg", "Round", "Sign", "Sin"])
def test_functions_of_one_tensor(op: str) -> None:
    network = check(f"y = {op} (x)", {"x": 2 * normal(1, 3, 5, 4)}, runtimes=EVERYWHERE)
    assert kinds(network) == [op.upper()]


@pytest.mark.parametrize("op", ["Log", "Reciprocal", "Sqrt"])
def test_functions_of_positive_numbers(op: str) -> None:
    check(f"y = {op} (x)", {"x": positive(1, 3, 5, 4)}, runtimes=EVERYWHERE)


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1.0, []),
        (2.0, ["MUL"]),
        (3.0, ["MUL", "MUL"]),
        (0.5, ["SQRT"]),
        (-0.5, ["RSQRT"]),
        (-1.0, ["DIV"]),
        (1.7, ["POW"]),
    ],
)
def test_powers(power: float, expected: list[str]) -> None:
    inputs = {"x": positive(1, 3, 5, 4), "p": np.float32(power)}
    assert kinds(check("e = Exp (x) y = Pow (e, p)", inputs)) == ["EXP", *expected]


def test_a_square_of_negative_numbers() -> None:
    check("y = Pow (x, p)", {"x": normal(1, 3, 5, 4), "p": np.array([2.0], np.float32)}, runtimes=EVERYWHERE)


@pytest.mark.parametrize("op", ["Max", "Mean", "Min", "Sum"])
def test_operators_of_any_number_of_operands(op: str) -> None:
    inputs = {"x": normal(1, 3, 5, 4)}
    check(f"y = {op} (x)", inputs)
    check(f"e = Exp (x) y = {op} (x, e)", inputs)
    network = check(f"e = Exp (x) t = Transpose <perm = [0, 1, 2, 3]> (e) s = Sin (x) y = {op} (x, t, s)", inputs)
    assert "TRANSPOSE" not in kinds(network)


@pytest.mark.parametrize("op", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"])
def test_comparisons_choose_between_tensors(op: str) -> None:
    inputs = {"x": np.round(2 * normal(1, 3, 5, 4)), "c": np.round(normal(3, 1, 1, seed=1)), "zero": np.float32(0)}
    body = (
        f"a = {op} (x, c) b = Less (x, zero) d = Or (a, b) n = Not (d) f = And (n, a) g = Or (f, d) y = Where (g, x, c)"
    )
    check(body, inputs, runtimes=EVERYWHERE)


OPERATORS = st.sampled_from([*ARITHMETIC, "Max", "Min"])


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape of x, shape of a constant, permutation of x that keeps the batch)."""
    full = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = tuple(draw(st.sampled_from([1, size])) for size in full)
    count = draw(st.integers(0, len(full)))
    c = tuple(draw(st.sampled_from([1, size])) for size in full[len(full) - count :])
    order = draw(st.permutations(range(1, len(full) + 1)))
    return (1, *x), c, (0, *order)


@settings(max_examples=60)
@given(broadcasts(), OPERATORS, st.sampled_from(EVERYWHERE))
def test_any_two_shapes_that_onnx_can_broadcast_agree_or_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], op: str, runtime: str
) -> None:
    """The permuted x makes the stored order differ from ONNX's own."""
    x, c, order = shapes
    undone = [order.index(axis) for axis in range(len(order))]
    given_x = positive(*(x[axis] for axis in undone))
    body = f"t = Transpose <perm = {list(order)}> (x) e = Exp (t) a = {op} (t, c) y = Mul (a, e)"
    inputs = {"x": given_x, "c": positive(*c, seed=1)}
    if is_refused(body, inputs):
        assert len(np.broadcast_shapes(x, c)) > 4
    else:
        check(body, inputs, runtimes=[runtime])


def is_refused(body: str, inputs: dict[str, np.ndarray]) -> bool:
    try:
        lower(graph(body, inputs))
    except ConversionError:
        return True
    return False


def test_numbers_are_not_rounded_on_the_way() -> None:
    value = np.float32(math.pi)
    network = network_of("y = Mul (x, c)", {"x": normal(1, 3, 5, 4), "c": value})
    (constant,) = network.constants()
    assert constant.data is not None
    assert constant.data.reshape(()) == value


@pytest.mark.parametrize("op", ["Max", "Mean", "Min", "Sum"])
def test_three_operands_of_different_shapes_are_refused_by_name(op: str) -> None:
    with pytest.raises(ConversionError, match=rf"{op} .* operands of different shapes"):
        network_of(f"e = Exp (x) y = {op} (x, e, c)", {"x": normal(1, 3, 5, 4), "c": normal(3, 1, 1)})
