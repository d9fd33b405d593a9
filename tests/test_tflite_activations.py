"""Activations: one operator where TFLite has it; written out, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from tflite_cases import EVERYWHERE, check, check_sources, graph, kinds, network_of, normal, positive

from lorac_runtime.errors import ConversionError

X = {"x": 4 * normal(1, 3, 5, 4)}
NUMBERS = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "six": np.float32(6),
    "zero": np.float32(0),
    "root": np.float32(np.sqrt(2)),
    "sixth": np.float32(1 / 6),
    "low": np.float32(-0.7),
    "minus": np.float32(-1),
    "largest": np.finfo(np.float32).max,
}

ONE = {
    "Relu": "RELU",
    "Sigmoid": "LOGISTIC",
    "Tanh": "TANH",
    "HardSwish": "HARD_SWISH",
    "Elu": "ELU",
    "LeakyRelu": "LEAKY_RELU",
    "LeakyRelu <alpha = 0.3>": "LEAKY_RELU",
}
SEVERAL = [
    "Celu <alpha = 1.5>",
    "Elu <alpha = 0.3>",
    "HardSigmoid",
    "HardSigmoid <alpha = 0.16666667, beta = 0.5>",
    "HardSigmoid <alpha = 0.3, beta = 0.4>",
    "Mish",
    "Selu",
    "Selu <alpha = 1.2, gamma = 0.9>",
    "Softplus",
    "Softsign",
]


@pytest.mark.parametrize(("op", "kind"), ONE.items())
def test_activations_that_are_one_operator(op: str, kind: str) -> None:
    assert kinds(check(f"y = {op} (x)", X, runtimes=EVERYWHERE)) == [kind]


@pytest.mark.parametrize("op", SEVERAL)
def test_activations_that_are_written_out(op: str) -> None:
    check(f"y = {op} (x)", X, runtimes=EVERYWHERE)


@pytest.mark.parametrize("op", ["Softplus", "Mish", "Elu <alpha = 0.3>", "Selu", "Softsign"])
def test_large_inputs_do_not_overflow(op: str) -> None:
    check(f"y = {op} (x)", {"x": 60 * normal(1, 3, 5, 4)}, runtimes=EVERYWHERE)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ("zero, six", ["RELU6"]),
        ("minus, one", ["RELU_N1_TO_1"]),
        ("zero, one", ["RELU_0_TO_1"]),
        ("zero", ["RELU"]),
        ("zero, largest", ["RELU"]),
        ("low", ["MAXIMUM"]),
        (", two", ["MINIMUM"]),
        ("low, two", ["MAXIMUM", "MINIMUM"]),
        ("zero, two", ["RELU", "MINIMUM"]),
    ],
)
def test_every_kind_of_bounds(bounds: str, expected: list[str]) -> None:
    network = check(f"y = Clip (x, {bounds})", X | NUMBERS, runtimes=EVERYWHERE)
    assert kinds(network) == expected


def test_bounds_that_are_none_cost_nothing() -> None:
    assert kinds(check("e = Exp (x) y = Clip (e)", {"x": normal(1, 3, 5, 4)})) == ["EXP"]


def test_computed_bounds_are_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="its bound 'b' is computed"):
        network_of("b = ReduceMax <keepdims = 0> (c) y = Clip (x, b)", X | {"c": normal(3)})


@pytest.mark.parametrize("slope", [(3, 1, 1), (1, 1, 1), (1,), (), (3, 5, 4), (1, 5, 1), (4,), (3, 1, 4)])
def test_slopes_per_channel_one_for_all_or_per_pixel(slope: tuple[int, ...]) -> None:
    inputs = X | {"slope": normal(*slope, seed=2)}
    assert kinds(check("y = PRelu (x, slope)", inputs, runtimes=EVERYWHERE)) == ["PRELU"]


def test_slopes_per_channel_can_be_written_anew_and_a_repeated_one_cannot() -> None:
    assert set(check_sources(graph("y = PRelu (x, slope)", X | {"slope": normal(3, 1, 1)}))) == {"slope"}
    constants = network_of("y = PRelu (x, slope)", X | {"slope": normal(1)}).constants()
    assert [(t.shape, t.source) for t in constants] == [((3,), None)]


def test_slopes_of_vectors() -> None:
    check("y = PRelu (x, slope)", {"x": normal(1, 7), "slope": normal(7, seed=1)}, runtimes=EVERYWHERE)
    check("y = PRelu (x, slope)", {"x": normal(1, 7), "slope": normal(1, seed=1)}, runtimes=EVERYWHERE)


GELUS = [
    "d = Div (x, root) e = Erf (d) a = Add (e, one) h = Mul (half, a) y = Mul (x, h)",
    "d = Div (x, root) e = Erf (d) a = Add (one, e) h = Mul (x, a) y = Mul (h, half)",
    "d = Mul (rooth, x) e = Erf (d) a = Add (e, one) h = Mul (x, half) y = Mul (h, a)",
    "d = Div (x, root) e = Erf (d) a = Add (e, one) h = Mul (x, a) y = Div (h, two)",
]


@pytest.mark.parametrize("body", GELUS)
def test_every_spelling_of_gelu_is_one_operator(body: str) -> None:
    inputs = X | NUMBERS | {"rooth": np.float32(np.sqrt(0.5))}
    assert kinds(check(body, inputs, runtimes=EVERYWHERE)) == ["GELU"]


@pytest.mark.parametrize("before", ["v = Mul (x, x)", "v = Mul (x, half)", "v = Div (x, two)"])
def test_gelu_of_a_product_is_still_gelu(before: str) -> None:
    inputs = X | NUMBERS | {"rooth": np.float32(np.sqrt(0.5))}
    for body in GELUS:
        assert kinds(check(f"{before} {body.replace('x', 'v')}", inputs))[-1] == "GELU"


def test_gelu_times_something_else_is_still_gelu() -> None:
    assert kinds(check(GELUS[0].replace("y =", "g =") + " y = Mul (g, two)", X | NUMBERS)) == ["GELU", "MUL"]


@pytest.mark.parametrize(
    "body",
    [
        GELUS[0].replace("root)", "two)"),
        GELUS[0].replace("half", "two"),
        GELUS[0].replace("one)", "two)"),
        GELUS[0].replace("y = Mul (x, h)", "s = Sin (x) y = Mul (s, h)"),
        GELUS[0].replace("y = Mul (x, h)", "z = Mul (x, h) y = Add (z, e)"),
    ],
)
def test_what_only_resembles_gelu_is_refused_by_name(body: str) -> None:
    with pytest.raises(ConversionError, match=r"Erf .* cannot be written to TFLite"):
        network_of(body, X | NUMBERS)


HARD_SWISHES = [
    "s = HardSigmoid <alpha = 0.16666667> (x) y = Mul (x, s)",
    "s = HardSigmoid <alpha = 0.16666667> (x) y = Mul (s, x)",
    "a = Add (x, three) c = Clip (a, zero, six) m = Mul (x, c) y = Div (m, six)",
    "a = Add (three, x) c = Clip (a, zero, six) d = Div (c, six) y = Mul (d, x)",
    "a = Add (x, three) c = Clip (a, zero, six) d = Mul (sixth, c) y = Mul (x, d)",
]


@pytest.mark.parametrize("body", HARD_SWISHES)
def test_every_spelling_of_hard_swish_is_one_operator(body: str) -> None:
    assert kinds(check(body, X | NUMBERS, runtimes=EVERYWHERE)) == ["HARD_SWISH"]


@pytest.mark.parametrize(
    "body",
    [
        HARD_SWISHES[0].replace("0.16666667", "0.2"),
        HARD_SWISHES[0]
        .replace("0.16666667> (x)", "0.16666667> (x) p = Add (s, one)")
        .replace("Mul (x, s)", "Div (s, p)"),
        HARD_SWISHES[0].replace("y = Mul (x, s)", "p = Exp (s) q = Div (x, p) y = Mul (q, s)"),
        HARD_SWISHES[0].replace("0.16666667", "0.16666667, beta = 0.4"),
        HARD_SWISHES[2].replace("three", "two"),
        HARD_SWISHES[2].replace("(m, six)", "(m, three)"),
        HARD_SWISHES[0].replace("y = Mul (x, s)", "t = Sin (x) y = Mul (t, s)"),
        HARD_SWISHES[0].replace("y = Mul (x, s)", "m = Mul (x, s) y = Sub (m, s)"),
    ],
)
def test_what_only_resembles_hard_swish_is_something_else_and_right(body: str) -> None:
    assert "HARD_SWISH" not in kinds(check(body, X | NUMBERS))


@pytest.mark.parametrize("quotient", ["x, s", "s, x"])
def test_a_quotient_is_no_hard_swish(quotient: str) -> None:
    inputs = {"x": positive(1, 3, 5, 4)}
    network = check(f"s = HardSigmoid <alpha = 0.16666667> (x) y = Div ({quotient})", inputs)
    assert kinds(network)[-1] == "DIV"


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_over_any_axis(op: str, axis: int) -> None:
    network = check(f"y = {op} <axis = {axis}> (x)", X, runtimes=EVERYWHERE)
    assert ("TRANSPOSE" in kinds(network)) == (axis != 1)


def test_softmax_of_logits_and_of_sequences() -> None:
    check("y = Softmax <axis = 1> (x)", {"x": normal(1, 10)})
    check("y = Softmax <axis = -1> (x)", {"x": normal(1, 6, 10)})


def test_softmax_over_the_batch_is_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="it normalises over the batch"):
        network_of("y = Softmax <axis = 0> (x)", X)


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 3, 5, 8), (1, 8)])
def test_layer_normalization_over_the_last_axis(shape: tuple[int, ...]) -> None:
    inputs = {"x": normal(*shape), "scale": normal(8, seed=1), "bias": normal(8, seed=2)}
    check("y = LayerNormalization <epsilon = 0.001> (x, scale, bias)", inputs, runtimes=EVERYWHERE)
    check("y = LayerNormalization (x, scale)", inputs)
    assert set(check_sources(graph("y = LayerNormalization (x, scale, bias)", inputs))) == {"scale", "bias"}


def test_layer_normalization_over_channels_needs_no_transposition() -> None:
    body = (
        "t = Transpose <perm = [0, 2, 3, 1]> (x) n = LayerNormalization (t, scale, bias) "
        "y = Transpose <perm = [0, 3, 1, 2]> (n)"
    )
    inputs = {"x": normal(1, 8, 5, 4), "scale": normal(8, seed=1), "bias": normal(8, seed=2)}
    network = check(body, inputs, runtimes=EVERYWHERE)
    assert kinds(network) == ["MEAN", "SUB", "MUL", "MEAN", "ADD", "RSQRT", "MUL", "MUL", "ADD"]


def test_layer_normalization_over_several_axes() -> None:
    inputs = {"x": normal(1, 3, 5, 4), "scale": normal(3, 5, 4, seed=1), "bias": normal(3, 5, 4, seed=2)}
    check("y = LayerNormalization <axis = 1> (x, scale, bias)", inputs)


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 3, 6)])
def test_instance_normalization(shape: tuple[int, ...]) -> None:
    inputs = {"x": normal(*shape), "scale": normal(3, seed=1), "bias": normal(3, seed=2)}
    network = check("y = InstanceNormalization (x, scale, bias)", inputs, runtimes=EVERYWHERE)
    assert "TRANSPOSE" not in kinds(network)


def test_group_normalization_as_exporters_write_it() -> None:
    body = (
        "g = Reshape (x, grouped) n = InstanceNormalization (g, ones, zeros) r = Reshape (n, back) "
        "m = Mul (r, scale) y = Add (m, bias)"
    )
    shapes = {"grouped": np.array([-1, 2, 40]), "back": np.array([-1, 4, 5, 4])}
    numbers = {"ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}
    affine = {"scale": normal(4, 1, 1, seed=1), "bias": normal(4, 1, 1, seed=2)}
    check(body, {"x": normal(1, 4, 5, 4)} | shapes | numbers | affine)


@pytest.mark.parametrize("op", ["HardSigmoid", "Softplus", "Elu <alpha = 0.3>", "Softsign", "HardSwish", "Sigmoid"])
def test_activations_of_five_axes(op: str) -> None:
    check(f"y = {op} (x)", {"x": normal(1, 2, 3, 4, 5)}, runtimes=EVERYWHERE)


@pytest.mark.parametrize(
    "body",
    [
        "y = HardSigmoid (x)",
        "y = Clip (x, low)",
        "y = PRelu (x, one)",
        "y = LayerNormalization (x, two)",
    ],
)
def test_more_axes_than_kernels_broadcast_over_are_refused_by_name(body: str) -> None:
    inputs = {"x": normal(1, 2, 1, 2, 3, 2)} | NUMBERS | {"two": normal(2)}
    with pytest.raises(ConversionError, match=r"cannot be written to TFLite: .* axes"):
        network_of(body, inputs)
