"""Fully connected layers and products of matrices; a flattened feature map is never transposed for a layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, check, check_sources, graph, kinds, network_of, node, normal, only

from lorac_exporters.tflite.lower import lower
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=40)
VECTOR = {"x": normal(1, 6), "w": normal(6, 4, seed=1), "b": normal(4, seed=2)}
MAP = {"x": normal(1, 3, 2, 4), "w": normal(24, 5, seed=1), "b": normal(5, seed=2), "flat": np.array([-1, 24])}


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.5, 0.0)])
@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), ()])
def test_gemm_is_one_fully_connected_layer(transposed: int, alpha: float, beta: float, bias: tuple[int, ...]) -> None:
    inputs = VECTOR | {"b": normal(*bias, seed=2)}
    inputs["w"] = np.ascontiguousarray(VECTOR["w"].T) if transposed else VECTOR["w"]
    body = node("Gemm", "x, w, b", transB=transposed, alpha=alpha, beta=beta)
    assert kinds(check(body, inputs, runtimes=EVERYWHERE)) == ["FULLY_CONNECTED"]


def test_gemm_without_a_third_input_has_no_bias() -> None:
    network = check(node("Gemm", "x, w"), {"x": VECTOR["x"], "w": VECTOR["w"]}, runtimes=EVERYWHERE)
    assert only(network, "FULLY_CONNECTED").inputs[2] is None


def test_a_third_input_that_is_computed_is_added() -> None:
    body = "v = Gemm (x, w, b) y = Gemm (x, u, v)"
    network = check(body, VECTOR | {"u": normal(6, 4, seed=3)})
    assert kinds(network) == ["FULLY_CONNECTED", "FULLY_CONNECTED", "ADD"]


LAYER = "v = MatMul (x, w) a = Add (b, v) y = Relu (a)"


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ((1, 6), LAYER),
        ((1, 6, 5), f"t = Transpose <perm = [0, 2, 1]> (x) {LAYER.replace('(x', '(t')}"),
        ((1, 6, 2, 5), f"t = Transpose <perm = [0, 2, 3, 1]> (x) {LAYER.replace('(x', '(t')}"),
    ],
)
def test_a_product_with_a_constant_matrix_and_its_bias_are_one_layer(shape: tuple[int, ...], body: str) -> None:
    network = check(body, VECTOR | {"x": normal(*shape)}, runtimes=EVERYWHERE)
    assert kinds(network)[0] == "FULLY_CONNECTED"  # the input lies channels-last already
    assert set(kinds(network)) <= {"FULLY_CONNECTED", "TRANSPOSE"}
    assert only(network, "FULLY_CONNECTED").options["fused_activation_function"] == "RELU"


@pytest.mark.parametrize(
    "body", ["v = MatMul (x, w) y = Add (v, v)", "v = MatMul (x, w) a = Add (v, b) y = Mul (a, v)"]
)
def test_a_product_that_is_read_twice_is_not_given_a_bias(body: str) -> None:
    network = check(body, VECTOR)
    assert only(network, "FULLY_CONNECTED").inputs[2] is None


FLATTENED = {
    "straight": "y = Gemm (f, w, b)",
    "after an activation": "r = Relu (f) y = Gemm (r, w, b)",
    "by two layers": "g = Gemm (f, w, b) m = MatMul (f, w) y = Mul (g, m)",
}


@pytest.mark.parametrize("flatten", ["f = Flatten (x)", "f = Reshape (x, flat)"])
@pytest.mark.parametrize("reading", FLATTENED)
def test_a_flattened_image_is_not_transposed_for_a_layer(flatten: str, reading: str) -> None:
    network = check(f"{flatten} {FLATTENED[reading]}", MAP, runtimes=EVERYWHERE)
    assert "TRANSPOSE" not in kinds(network)
    weight = (
        only(network, "FULLY_CONNECTED").inputs[1] if reading != "by two layers" else network.operators[1].inputs[1]
    )
    assert weight is not None
    assert weight.source is not None
    assert (weight.source.view, weight.source.permute) == ((3, 2, 4, 5), (3, 1, 2, 0))


@pytest.mark.parametrize(
    "reading",
    [
        "y = Mul (f, c)",
        "g = Gemm (f, w, b) s = MatMul (f, c2) t = Add (f, c) u = MatMul (t, c2) y = Add (s, u)",
        "r = Relu (f) m = Mul (r, c) y = Gemm (m, w, b)",
        "y = Softmax (f)",
        "y = Relu (f)",
    ],
)
def test_a_flattened_image_that_anything_else_reads_is_in_onnxs_order(reading: str) -> None:
    inputs = MAP | {"c": normal(24, seed=4), "c2": normal(24, 5, seed=5)}
    assert "TRANSPOSE" in kinds(check(f"f = Flatten (x) {reading}", inputs))


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_flattened_image_gives_the_layer_onnxs_numbers(
    channels: int, high: int, wide: int, transposed: bool, turned: bool
) -> None:
    size = channels * high * wide
    w = normal(5, size, seed=1) if transposed else normal(size, 5, seed=1)
    before = "t = Transpose <perm = [0, 3, 1, 2]> (x)" if turned else "t = Relu (x)"
    body = f"{before} f = Flatten (t) {node('Gemm', 'f, w, b', transB=int(transposed))}"
    inputs = {"x": normal(1, channels, high, wide), "w": w, "b": normal(5, seed=2)}
    assert "TRANSPOSE" not in kinds(check(body, inputs))
    assert set(check_sources(graph(body, inputs))) == {"w", "b"}


def test_new_weights_can_be_written_into_scaled_ones_never() -> None:
    network = network_of(node("Gemm", "x, w, b", alpha=0.5), VECTOR)
    assert {t.source.name for t in network.constants() if t.source is not None} == {"b"}


PRODUCTS = {
    "same": "a = Reshape (x, s) b = Sigmoid (a) y = MatMul (a, b)",
    "second transposed": "a = Reshape (x, s) t = Transpose <perm = [0, 1, 3, 2]> (a) y = MatMul (a, t)",
    "first transposed": "a = Reshape (x, s) t = Transpose <perm = [0, 1, 3, 2]> (a) y = MatMul (t, a)",
    "a constant on the left": "a = Reshape (x, s) y = MatMul (c, a)",
    "constants for each channel": "a = Reshape (x, s) y = MatMul (a, d)",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_computed_matrices_are_onnxs(name: str) -> None:
    inputs = {"x": normal(1, 3, 4, 4), "s": np.array([-1, 3, 4, 4])}
    inputs |= {"c": normal(5, 4, seed=1), "d": normal(3, 4, 2, seed=2)}
    network = check(PRODUCTS[name], inputs, runtimes=EVERYWHERE)
    assert "BATCH_MATMUL" in kinds(network)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_of_two_computed_matrices_is_their_product(transposed: int) -> None:
    body = f"v = Sigmoid (w) {node('Gemm', 'x, v', transB=transposed)}"
    assert "BATCH_MATMUL" in kinds(check(body, {"x": normal(1, 4), "w": normal(4, 4, seed=1)}))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Gemm <transA = 1> (x, w)", "transA"),
        ("y = Gemm (c, x)", "first input 'c' is a constant"),
        ("r = Sigmoid (w) y = Gemm <alpha = 0.5> (x, r)", "alpha 1"),
        ("y = MatMul (x, v)", "is a vector"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(body: str, why: str) -> None:
    inputs = {"x": normal(4, 4), "w": normal(4, 4), "c": normal(4, 4), "v": normal(4)}
    with pytest.raises(ConversionError, match=f"(Gemm|MatMul) .*{why}"):
        lower(graph(body, inputs))
