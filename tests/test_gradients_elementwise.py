"""Gradients of elementwise operators, with every kind of broadcasting, against PyTorch."""

from __future__ import annotations

import functools
import operator

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import check, gradients, graph_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_exporters.gradients.elementwise import unbroadcast
from lorac_exporters.gradients.tape import Dim, Tape, dims
from lorac_runtime.errors import ConversionError

BINARY = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}
SHAPES = [
    ((3, 4, 5, 6), (3, 4, 5, 6)),
    ((3, 4, 5, 6), (1, 4, 1, 1)),
    ((3, 4, 5, 6), (4, 1, 1)),
    ((3, 4, 5, 6), (3, 4, 1, 1)),
    ((3, 4, 5, 6), (3, 1, 5, 6)),
    ((3, 4, 1, 1), (3, 1, 5, 6)),
    ((3, 4, 1, 1), (4, 5, 6)),
    ((3, 4), (2, 3, 4)),
    ((3, 1), (5, 1, 1, 4)),
    ((3, 7), ()),
    ((3, 7), (1,)),
    ((3, 1, 1), (1, 1, 1)),
    ((1, 4), (1, 1)),
    ((1, 4), (1, 4)),
]


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return 0.5 + np.abs(normal(*shape, seed=seed))


def is_free(*shapes: tuple[int, ...]) -> bool:
    """Whether the first axis of the first shape can be symbolic: no other shape has a size there, or only 1."""
    return all(len(s) < len(shapes[0]) or s[len(s) - len(shapes[0])] == 1 for s in shapes[1:])


def count(model: ir.Model, *op_types: str) -> int:
    return sum(node.op_type in op_types for node in model.graph)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_the_gradients_of_binary_operators_have_the_shapes_of_their_inputs(name, shapes):
    inputs = {"x": normal(*shapes[0]), "b": positive(*shapes[1], seed=1)}
    check(f"y = {name} (x, b)", inputs, lambda x, b: BINARY[name](x, b), batch=is_free(*shapes))


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("wanted", ["x", "b"])
def test_each_side_of_a_binary_operator_can_be_wanted_alone(name, wanted):
    inputs = {"x": normal(3, 4, 2), "b": positive(4, 1, seed=1)}
    check(f"y = {name} (b, x)", {**inputs, "x": positive(3, 4, 2)}, lambda x, b: BINARY[name](b, x), wrt=[wanted])


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of up to five axes that broadcast; the first axis of the first is the batch axis."""
    full = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    x, b = ([draw(st.sampled_from([1, size])) for size in full] for _ in range(2))
    start = draw(st.integers(0, len(full)))
    return (tuple(full[:1] + x[1:]), tuple(b[start:])) if draw(st.booleans()) else (tuple(x), tuple(b[start:]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(broadcast_shapes(), st.sampled_from(sorted(BINARY)))
def test_any_broadcast_is_undone(shapes, name):
    x_shape, b_shape = shapes
    inputs = {"x": normal(*x_shape), "b": positive(*b_shape, seed=1)}
    check(f"y = {name} (x, b)", inputs, lambda x, b: BINARY[name](x, b), batch=is_free(*shapes), differences=False)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_one_graph_serves_any_batch_size(batch):
    model = graph_of("y = Mul (x, b)", {"x": normal(3, 4, 2), "b": normal(1, 4, 1)})
    x, b, c = normal(batch, 4, 2), normal(1, 4, 1, seed=1), normal(batch, 4, 2, seed=2)
    found = gradients(model, {"x": x, "b": b}, ["x", "b"], c)
    np.testing.assert_allclose(found["x"], c * b, atol=1e-6)
    np.testing.assert_allclose(found["b"], (c * x).sum((0, 2), keepdims=True), atol=1e-5)


def test_one_value_on_both_sides_gets_both_gradients():
    check("y = Mul (x, x)", {"x": normal(3, 4)}, lambda x: x * x)
    check("a = Neg (x) b = Sub (x, a) y = Div (b, b)", {"x": positive(3, 4)}, lambda x: (x + x) / (x + x))


def test_two_values_of_one_free_batch_size_broadcast():
    inputs = {"x": normal(3, 4, 1, 1), "b": normal(4, 5, 6, seed=1)}
    check("a = Mul (x, b) g = Exp (x) y = Mul (a, g)", inputs, lambda x, b: x * b * torch.exp(x))


@pytest.mark.parametrize(
    ("full", "target", "kinds"),
    [
        (("batch", 4, 5), ("batch", 4, 5), []),
        (("batch", 4, 5), ("batch", 4, 1), ["ReduceSum"]),
        (("batch", 4, 5), (4, 5), ["ReduceSum"]),
        (("batch", 4, 5), (1, 4, 1), ["ReduceSum"]),
        (("batch", 4, 5), (4, 1), ["ReduceSum", "Unsqueeze"]),
        (("batch", 4, 5), (), ["ReduceSum"]),
    ],
)
def test_sums_are_written_only_where_something_was_repeated(full, target, kinds):
    grad, value = given_value("grad", full), given_value("target", target)
    graph = ir.Graph([grad], [], nodes=[], opset_imports={"": 18})
    result = unbroadcast(Tape(graph), grad, value)
    assert [node.op_type for node in graph] == kinds
    assert dims(result) == target


def given_value(name: str, shape: tuple[Dim, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize(("full", "target"), [((3, 4), ("batch", 4)), (("n", 4), ("batch", 4)), ((None,), (None,))])
def test_a_broadcast_known_only_at_run_time_is_refused(full, target):
    grad, value = given_value("grad", full), given_value("target", target)
    tape = Tape(ir.Graph([grad], [], nodes=[], opset_imports={"": 18}))
    with pytest.raises(ConversionError, match=r"'target' has shape .* known only at run time; give"):
        unbroadcast(tape, grad, value)


UNARY = {
    "Neg": (normal, torch.neg),
    "Abs": (normal, torch.abs),
    "Sqrt": (positive, torch.sqrt),
    "Exp": (normal, torch.exp),
    "Log": (positive, torch.log),
    "Reciprocal": (positive, torch.reciprocal),
    "Erf": (normal, torch.erf),
    "Identity": (normal, torch.clone),
}


@pytest.mark.parametrize("shape", [(3,), (2, 5), (3, 4, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_the_gradient_of_a_unary_operator(name, shape):
    make, reference = UNARY[name]
    check(f"y = {name} (x)", {"x": make(*shape)}, reference, differences=name != "Abs")


def test_the_slope_of_abs_is_0_at_0():
    check("y = Abs (x)", {"x": np.float32([-1, 0, 2])}, torch.abs, differences=False)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0, -1.0, -2.5])
def test_the_gradient_of_a_power(exponent):
    inputs = {"x": positive(3, 4), "e": np.float32(exponent)}
    check("y = Pow (x, e)", inputs, lambda x, e: x**exponent, wrt=["x"], fixed=["e"])


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0])
def test_powers_of_negative_numbers_and_of_0_have_gradients(exponent):
    inputs = {"x": np.float32([-2, -0.5, 0, 1.5]), "e": np.float32(exponent)}
    check("y = Pow (x, e)", inputs, lambda x, e: x**exponent, wrt=["x"], fixed=["e"], differences=False)


def test_an_exponent_may_be_an_integer_or_broadcast():
    x = positive(3, 4)
    check("y = Pow (x, e)", {"x": x, "e": np.int64(3)}, lambda x, e: x**3, wrt=["x"], fixed=["e"])
    exponents = np.float32([[[0, 1, 2, 3]], [[-1, 0.5, 1, 2]]])
    check("y = Pow (x, e)", {"x": x, "e": exponents}, lambda x, e: x**e, wrt=["x"], fixed=["e"])


@pytest.mark.parametrize(("fixed", "wrt"), [([], ["x"]), (["e"], ["e"])])
def test_an_exponent_that_is_computed_or_trained_is_refused(fixed, wrt):
    inputs = {"x": positive(3, 4), "e": np.float32(2)}
    model = graph_of("[square] y = Pow (x, e)", inputs, fixed=fixed)
    with pytest.raises(ConversionError, match=r"Pow 'square' has an exponent that is computed or trained"):
        gradients(model, inputs, wrt, normal(3, 4))


EXTREMES = {"Min": torch.minimum, "Max": torch.maximum}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 4), ()), ((3, 1), (2, 3, 4))], ids=str)
def test_the_gradient_of_the_larger_or_smaller_goes_to_it(name, shapes):
    inputs = {"x": normal(*shapes[0]), "b": normal(*shapes[1], seed=1)}
    reference, batch = EXTREMES[name], is_free(*shapes)
    check(f"y = {name} (x, b)", inputs, lambda x, b: reference(x, b), batch=batch, differences=False)


@pytest.mark.parametrize("name", EXTREMES)
def test_of_one_or_three_inputs_the_extreme_one_gets_the_gradient(name):
    three = {"x": normal(3, 4), "b": normal(4, seed=1), "d": normal(3, 1, seed=2)}
    reference = EXTREMES[name]
    check(f"y = {name} (x, b, d)", three, lambda x, b, d: reference(reference(x, b), d), batch=False, differences=False)
    check(f"y = {name} (x)", {"x": normal(3, 4)}, torch.clone)


@pytest.mark.parametrize("name", EXTREMES)
def test_inputs_that_tie_share_the_gradient(name):
    x = np.float32([-1, 0, 0, 2])
    check(f"y = {name} (x, b)", {"x": x, "b": np.float32(0)}, lambda x, b: EXTREMES[name](x, b), differences=False)
    inputs = {"x": x, "b": np.float32([-1, 0, 1, 2]), "d": np.float32([-1, 5, -5, 3])}
    reduce = {"Min": torch.amin, "Max": torch.amax}[name]
    check(
        f"y = {name} (x, b, d)",
        inputs,
        lambda x, b, d: reduce(torch.stack([x, b, d]), 0),
        batch=False,
        differences=False,
    )


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4), (3, 4)), ((3, 4), (4,), ()), ((4,), (3, 1), (3, 4))], ids=str)
@pytest.mark.parametrize("wrt", [["x", "b"], ["x"], ["b"]], ids=str)
def test_the_gradient_of_where_goes_where_the_value_came_from(shapes, wrt):
    inputs = {"x": normal(*shapes[0]), "b": normal(*shapes[1], seed=1), "q": normal(*shapes[2], seed=2) > 0}
    check("y = Where (q, x, b)", inputs, lambda x, b, q: torch.where(q, x, b), wrt=wrt, batch=False)


def total(**given: torch.Tensor) -> torch.Tensor:
    return functools.reduce(operator.add, given.values())


@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 4), (3, 4)], [(3, 4), (4,), (1, 1), (2, 1, 1)]], ids=str)
def test_the_gradients_of_sum_and_mean(shapes):
    names = ["x", "b", "d", "f"][: len(shapes)]
    inputs = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    check(f"y = Sum ({', '.join(names)})", inputs, total, batch=is_free(*shapes))
    check(f"y = Mean ({', '.join(names)})", inputs, lambda **given: total(**given) / len(names), batch=is_free(*shapes))


def test_a_cast_between_floats_casts_the_gradient_back():
    check("y = Cast <to = 1> (x)", {"x": normal(3, 4)}, torch.clone)
    inputs = {"x": normal(3, 4)}
    check("a = Cast <to = 11> (x) b = Mul (a, a) y = Cast <to = 1> (b)", inputs, lambda x: x * x)


def test_a_cast_of_the_same_type_costs_nothing():
    model = graph_of("y = Cast <to = 1> (x)", {"x": normal(3, 4)})
    gradients(model, {"x": normal(3, 4)}, ["x"], normal(3, 4))
    assert count(model, "Cast") == 1


def test_the_gradient_of_gelu_written_with_erf():
    body = """
        root = Constant <value_float = 1.4142135> () one = Constant <value_float = 1.0> ()
        half = Constant <value_float = 0.5> ()
        a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)
    """
    check(body, {"x": 2 * normal(3, 4, 5)}, torch.nn.functional.gelu)


def test_the_gradient_of_gelu_written_with_tanh():
    body = """
        a = Pow (x, three) b = Mul (a, cubic) c = Add (x, b) d = Mul (c, slope) e = Tanh (d) f = Add (e, one)
        g = Mul (x, f) y = Mul (g, half)
    """
    numbers = {"three": 3, "cubic": 0.044715, "slope": 0.7978846, "one": 1, "half": 0.5}
    inputs = {"x": 2 * normal(3, 4, 5), **{name: np.float32(n) for name, n in numbers.items()}}
    reference = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    check(body, inputs, lambda x, **_: reference(x), wrt=["x"], fixed=list(numbers))
