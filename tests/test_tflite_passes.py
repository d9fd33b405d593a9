"""Folding and removing operators of a lowered network: fewer operators, the same numbers, the same names."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from tflite_cases import EVERYWHERE, check, kinds, network_of, normal

from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.passes import drop_idle, fold_activations, remove_dead

X = {"x": normal(1, 6, 4, 5), "k": normal(6, 6, 1, 1, seed=1), "c": normal(6, 1, 1, seed=2)}
BOUNDS = {"zero": np.float32(0), "one": np.float32(1), "six": np.float32(6), "minus": np.float32(-1)}
ACTIVATIONS = {"Relu (v)": "RELU", "Clip (v, zero, six)": "RELU6", "Clip (v, minus, one)": "RELU_N1_TO_1"}
BEFORE = {
    "CONV_2D": "v = Conv (x, k)",
    "ADD": "v = Add (x, c)",
    "SUB": "v = Sub (x, c)",
    "MUL": "v = Mul (x, c)",
    "DIV": "v = Div (x, c)",
    "MAX_POOL_2D": "v = MaxPool <kernel_shape = [2, 2]> (x)",
    "AVERAGE_POOL_2D": "v = AveragePool <kernel_shape = [2, 2]> (x)",
    "DEPTHWISE_CONV_2D": "v = Conv <group = 6> (x, d)",
}


@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS.items())
@pytest.mark.parametrize(("kind", "body"), BEFORE.items())
def test_an_activation_becomes_an_option_of_the_operator_before(
    kind: str, body: str, activation: str, name: str
) -> None:
    inputs = X | BOUNDS | {"d": normal(6, 1, 3, 3, seed=3)}
    network = check(f"{body} y = {activation}", inputs, runtimes=EVERYWHERE)
    (operator,) = network.operators
    assert (operator.kind, operator.options["fused_activation_function"]) == (kind, name)
    assert operator.outputs[0].name == "y"


def test_an_activation_of_a_fully_connected_layer_is_folded() -> None:
    inputs = {"x": normal(1, 7), "w": normal(7, 5, seed=1), "b": normal(5, seed=2)}
    network = check("g = Gemm (x, w, b) y = Relu (g)", inputs, runtimes=EVERYWHERE)
    assert kinds(network) == ["FULLY_CONNECTED"]


@pytest.mark.parametrize(
    "body",
    [
        "v = Add (x, c) r = Relu (v) y = Mul (r, v)",
        "v = Add (x, c) r = Relu (v) s = Sin (v) y = Mul (r, s)",
        "v = Add (x, c) r = Relu (v) s = Clip (v, zero, six) y = Mul (r, s)",
    ],
)
def test_a_tensor_with_two_users_keeps_its_activation_apart(body: str) -> None:
    network = check(body, X | BOUNDS)
    assert {"RELU"} <= set(kinds(network))
    assert network.operators[0].options["fused_activation_function"] == "NONE"


def test_a_second_activation_stays_an_operator() -> None:
    network = check("v = Add (x, c) r = Relu (v) y = Clip (r, minus, one)", X | BOUNDS)
    assert kinds(network) == ["ADD", "RELU_N1_TO_1"]


def test_concatenation_takes_no_activation() -> None:
    """Its kernels refuse one."""
    assert kinds(check("v = Concat <axis = 1> (x, x) y = Relu (v)", X, runtimes=EVERYWHERE)) == [
        "CONCATENATION",
        "RELU",
    ]


def test_other_bounds_are_not_folded() -> None:
    assert kinds(check("v = Add (x, c) y = Clip (v, zero, one)", X | BOUNDS)) == ["ADD", "RELU_0_TO_1"]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [Tensor(f"t{i}", shape, batch_axis=0) for i, shape in enumerate(shapes)]


def moving(kind: str, given: Tensor, made: Tensor, numbers: list[int]) -> Operator:
    data = np.array(numbers, np.int32)
    return Operator(kind, [given, Tensor(f"{made.name}_numbers", data.shape, "int32", data=data)], [made])


def network(operators: list[Operator], given: Tensor, *results: Tensor) -> Network:
    return Network(operators, [given], list(results), ("x",), tuple(f"y{i}" for i in range(len(results))))


def test_a_network_output_keeps_its_activation_apart() -> None:
    x, a, b = tensors((1, 3), (1, 3), (1, 3))
    made = network([Operator("ADD", [x, x], [a]), Operator("RELU", [a], [b])], x, a, b)
    fold_activations(made)
    assert kinds(made) == ["ADD", "RELU"]
    made.outputs = [b]
    fold_activations(made)
    assert (kinds(made), made.operators[0].outputs) == (["ADD"], [b])


def test_inverse_transpositions_vanish_and_the_output_keeps_its_name() -> None:
    x, a, b, c, y = tensors((1, 2, 3), (1, 2, 3), (1, 3, 2), (1, 2, 3), (1, 2, 3))
    operators = [
        Operator("ABS", [x], [a]),
        moving("TRANSPOSE", a, b, [0, 2, 1]),
        moving("TRANSPOSE", b, c, [0, 2, 1]),
        moving("RESHAPE", c, y, [-1, 2, 3]),
    ]
    made = network(operators, x, y)
    drop_idle(made)
    remove_dead(made)
    assert kinds(made) == ["ABS"]
    assert made.outputs == made.operators[0].outputs
    assert made.outputs[0].name == y.name


def test_transpositions_in_a_row_become_one() -> None:
    x, a, y = tensors((1, 2, 3, 4), (1, 3, 4, 2), (1, 2, 4, 3))
    made = network([moving("TRANSPOSE", x, a, [0, 2, 3, 1]), moving("TRANSPOSE", a, y, [0, 3, 2, 1])], x, y)
    drop_idle(made)
    remove_dead(made)
    (operator,) = made.operators
    assert operator.inputs[0] is x
    permutation = operator.inputs[1]
    assert permutation is not None
    assert permutation.data is not None
    assert permutation.data.tolist() == [0, 1, 3, 2]


def test_equal_transpositions_are_made_once() -> None:
    x, a, b, y = tensors((1, 2, 3), (1, 3, 2), (1, 3, 2), (1, 3, 2))
    operators = [
        moving("TRANSPOSE", x, a, [0, 2, 1]),
        moving("TRANSPOSE", x, b, [0, 2, 1]),
        Operator("ADD", [a, b], [y]),
    ]
    made = network(operators, x, y)
    drop_idle(made)
    assert kinds(made) == ["TRANSPOSE", "ADD"]
    assert made.operators[1].inputs == [a, a]


def test_an_idle_operator_between_an_input_and_an_output_stays() -> None:
    """The output must be computed: a tensor cannot be both under two names."""
    x, y = tensors((1, 2, 3), (1, 2, 3))
    made = network([moving("RESHAPE", x, y, [-1, 2, 3])], x, y)
    drop_idle(made)
    assert kinds(made) == ["RESHAPE"]


def test_idle_padding_and_unread_operators_are_removed() -> None:
    x, a, b, y = tensors((1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3))
    operators = [moving("PAD", x, a, [0] * 6), Operator("EXP", [a], [b]), Operator("ABS", [a], [y])]
    made = network(operators, x, y)
    drop_idle(made)
    remove_dead(made)
    assert (kinds(made), made.operators[0].inputs) == (["ABS"], [x])


def test_reshapes_in_a_row_become_one() -> None:
    body = "a = Reshape (x, flat) b = Reshape (a, rows) y = Exp (b)"
    shapes = {"flat": np.array([-1, 120]), "rows": np.array([-1, 10, 12])}
    assert kinds(check(body, {"x": normal(1, 6, 4, 5)} | shapes)).count("RESHAPE") == 1


def test_the_kept_axes_of_a_mean_are_squeezed_at_once() -> None:
    body = "m = ReduceMean <keepdims = 1> (x, axes) y = Reshape (m, flat)"
    shapes = {"axes": np.array([2, 3]), "flat": np.array([-1, 6])}
    assert kinds(check(body, {"x": normal(1, 6, 4, 5)} | shapes)) == ["MEAN"]


def test_a_product_with_a_matrix_and_a_vector_added_is_one_layer() -> None:
    inputs = {"x": normal(1, 6, 7), "w": normal(7, 5, seed=1), "b": normal(5, seed=2)}
    network = check("m = MatMul (x, w) a = Add (b, m) y = Relu (a)", inputs, runtimes=EVERYWHERE)
    assert [kind for kind in kinds(network) if kind != "TRANSPOSE"] == ["FULLY_CONNECTED"]


@pytest.mark.parametrize("body", ["y = Softmax <axis = 2> (x)", "e = Exp (x) y = Transpose <perm = [0, 1, 2, 3]> (e)"])
def test_outputs_keep_their_names(body: str) -> None:
    network = check(body, X)
    assert network.outputs[0].name == "y"
    names = [tensor.name for tensor in network.tensors()]
    assert len(set(names)) == len(names)


def test_long_networks_take_time_in_proportion() -> None:
    """20,000 operators in a few seconds; passes that search the whole network for each would take minutes."""
    parts = tensors(*[(1, 3)] * 20001)
    operators = [
        Operator("ADD" if i % 2 else "RELU", [a] * (1 + i % 2), [b])
        for i, (a, b) in enumerate(itertools.pairwise(parts))
    ]
    made = network(operators, parts[0], parts[-1])
    start = time.perf_counter()
    for step in (drop_idle, remove_dead, fold_activations):
        step(made)
    assert time.perf_counter() - start < 5
    assert len(made.operators) == 10001


def test_no_pass_touches_what_is_lean_already() -> None:
    made = network_of("a = Conv (x, k) b = Relu (a) y = MaxPool <kernel_shape = [2, 2]> (b)", X)
    assert kinds(made) == ["CONV_2D", "MAX_POOL_2D"]
