"""Gradients of activation functions against PyTorch, at their kinks too."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import check, gradients, graph_of, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape
from lorac_runtime.errors import ConversionError

Reference = Callable[[torch.Tensor], torch.Tensor]


SMOOTH: dict[str, Reference] = {
    "Sigmoid": lambda x: torch.sigmoid(x),
    "Tanh": lambda x: torch.tanh(x),
    "Softplus": lambda x: torch.log1p(torch.exp(x)),
    "Softsign": lambda x: functional.softsign(x),
    "Mish": lambda x: functional.mish(x),
    "Elu": lambda x: functional.elu(x),
    "Celu": lambda x: functional.celu(x),
    "Celu <alpha = 0.5>": lambda x: functional.celu(x, 0.5),
    "Celu <alpha = 3.0>": lambda x: functional.celu(x, 3.0),
    "Softmax": lambda x: torch.softmax(x, -1),
    "LogSoftmax": lambda x: torch.log_softmax(x, -1),
}
KINKED: dict[str, Reference] = {
    "Relu": lambda x: torch.relu(x),
    "LeakyRelu": lambda x: functional.leaky_relu(x),
    "LeakyRelu <alpha = 0.3>": lambda x: functional.leaky_relu(x, 0.3),
    "LeakyRelu <alpha = 0.0>": lambda x: functional.leaky_relu(x, 0.0),
    "LeakyRelu <alpha = 1.7>": lambda x: functional.leaky_relu(x, 1.7),
    "LeakyRelu <alpha = -0.4>": lambda x: functional.leaky_relu(x, -0.4),
    "Elu <alpha = 0.3>": lambda x: functional.elu(x, 0.3),
    "Elu <alpha = 2.0>": lambda x: functional.elu(x, 2.0),
    "Selu": lambda x: functional.selu(x),
    "Selu <alpha = 0.7, gamma = 1.9>": lambda x: 1.9 * functional.elu(x, 0.7),
    "HardSigmoid": lambda x: functional.hardtanh(0.2 * x + 0.5, 0, 1),
    "HardSigmoid <alpha = -0.7, beta = 0.3>": lambda x: functional.hardtanh(-0.7 * x + 0.3, 0, 1),
    "HardSigmoid <alpha = 0.16666667, beta = 0.5>": lambda x: functional.hardsigmoid(x),
    "HardSwish": lambda x: functional.hardswish(x),
    "ThresholdedRelu": lambda x: functional.threshold(x, 1.0, 0.0),
    "ThresholdedRelu <alpha = -0.5>": lambda x: functional.threshold(x, -0.5, 0.0),
}


def body_of(name: str) -> str:
    return f"y = {name} (x)"


@pytest.mark.parametrize("shape", [(7,), (3, 5), (3, 4, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_a_smooth_activation(name, shape):
    check(body_of(name), {"x": 2 * normal(*shape)}, SMOOTH[name], differences=0 not in shape)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", KINKED)
def test_the_gradient_of_an_activation_with_kinks(name, shape):
    check(body_of(name), {"x": 3 * normal(*shape)}, KINKED[name], differences=False)


@pytest.mark.parametrize("name", ["Relu", "LeakyRelu", "LeakyRelu <alpha = -0.4>", "Elu <alpha = 2.0>", "Selu", "Celu"])
def test_at_0_the_slope_is_that_of_pytorch(name):
    reference = {**SMOOTH, **KINKED}[name]
    check(body_of(name), {"x": np.float32([-1, 0, -0.0, 1])}, reference, differences=False)


@pytest.mark.parametrize("name", ["HardSwish", "HardSigmoid <alpha = 0.16666667, beta = 0.5>"])
def test_at_the_bounds_of_hard_activations_the_slope_is_that_of_pytorch(name):
    x = np.float32([-3, -2.999, -3.001, 0, 2.999, 3.001, 3])
    check(body_of(name), {"x": x}, KINKED[name], differences=False)


def test_at_its_threshold_a_thresholded_relu_has_slope_0():
    x = np.float32([0.5, 1, 1.5])
    check("y = ThresholdedRelu (x)", {"x": x}, KINKED["ThresholdedRelu"], differences=False)


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_large_inputs_give_finite_gradients(name):
    x = np.float32([[-1e4, -90, 90, 1e4]])
    (found,) = gradients(graph_of(body_of(name), {"x": x}), {"x": x}, ["x"], np.ones_like(x)).values()
    tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    reference = functional.softplus if name == "Softplus" else {**SMOOTH, **KINKED}[name]
    reference(tensor).sum().backward()
    np.testing.assert_allclose(found, tensor.grad.numpy(), atol=2e-6)


@pytest.mark.parametrize("bounds", ["x, low, high", "x, low", "x, , high", "x"])
def test_the_gradient_of_clip_passes_strictly_between_its_bounds(bounds):
    inputs = {"x": np.float32([-2, -1, -0.5, 0, 1.5, 6, 7]), "low": np.float32(-1), "high": np.float32(6)}
    used = {"low": -1.0 if "low" in bounds else None, "high": 6.0 if "high" in bounds else None}

    def reference(x, low, high):
        low, high = (math.inf * sign if v is None else v for sign, v in zip((-1, 1), used.values(), strict=True))
        return torch.where((x > low) & (x < high), x, x.detach().clamp(low, high))

    check(f"y = Clip ({bounds})", inputs, reference, wrt=["x"], fixed=["low", "high"], differences=False)


@pytest.mark.parametrize("bounds", ["x, b", "x, , b"])
@pytest.mark.parametrize(("fixed", "wrt"), [([], ["x"]), (["b"], ["b"])])
def test_bounds_that_are_computed_or_trained_are_refused(bounds, fixed, wrt):
    inputs = {"x": normal(3, 4), "b": np.float32(0)}
    model = graph_of(f"[cut] y = Clip ({bounds})", inputs, fixed=fixed)
    with pytest.raises(ConversionError, match=r"Clip 'cut' has bounds that are computed or trained"):
        gradients(model, inputs, wrt, normal(3, 4))


@pytest.mark.parametrize(
    "shapes", [((3, 4), ()), ((3, 4), (1,)), ((3, 4, 5), (4, 1)), ((3, 4, 2, 2), (4, 1, 1))], ids=str
)
@pytest.mark.parametrize("wrt", [["x", "s"], ["x"], ["s"]], ids=str)
def test_the_gradient_of_prelu(shapes, wrt):
    inputs = {"x": normal(*shapes[0]), "s": normal(*shapes[1], seed=1)}
    check("y = PRelu (x, s)", inputs, lambda x, s: torch.where(x > 0, x, s * x), wrt=wrt, differences=False)


def test_at_0_prelu_has_its_lower_slope():
    inputs = {"x": np.float32([[-1, 0, 2]]), "s": np.float32([0.25])}
    check("y = PRelu (x, s)", inputs, lambda x, s: functional.prelu(x, s), differences=False)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_softmax_goes_along_any_axis(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    inputs = {"x": 2 * normal(*shape)}
    check(f"y = Softmax <axis = {axis}> (x)", inputs, lambda x: torch.softmax(x, axis), differences=False)
    check(f"y = LogSoftmax <axis = {axis}> (x)", inputs, lambda x: torch.log_softmax(x, axis), differences=False)


@pytest.mark.parametrize(
    "attribute", ["Elu <alpha = -1.0>", "Elu <alpha = 0.0>", "Selu <gamma = -1.0>", "Celu <alpha = -2.0>"]
)
def test_attributes_that_turn_the_sign_of_the_output_are_refused(attribute):
    model = graph_of(f"[bend] y = {attribute} (x)", {"x": normal(3, 4)})
    with pytest.raises(ConversionError, match=r"'bend' has (alpha|gamma) = .*; only values above 0"):
        gradients(model, {"x": normal(3, 4)}, ["x"], normal(3, 4))


def test_relu_is_differentiated_from_its_output_in_three_nodes():
    model = graph_of("y = Relu (x)", {"x": normal(3, 4)})
    gradients(model, {"x": normal(3, 4)}, ["x"], normal(3, 4))
    assert [use.node.op_type for use in model.graph.inputs[0].uses()] == ["Relu"]
    assert [node.op_type for node in model.graph][-3:] == ["Greater", "Cast", "Mul"]


TRAINING = "t = Constant <value = bool {1}> () "


def dropout(body: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The output, and the gradient of its sum, of one run of a Dropout node."""
    model = graph_of(body, inputs)
    graph = model.graph
    fold(graph)
    x, y = graph.inputs[0], graph.outputs[0]
    tape = Tape(graph)
    loss = tape.op("ReduceSum", y, shape=(), attributes={"keepdims": 0})
    graph.outputs.extend(differentiate(tape, loss, [x]))
    value, grad = run(model, inputs)
    return {"value": value, "grad": grad}


def fold(graph: ir.Graph) -> None:
    """Constant nodes become initializers, as in canonical graphs."""
    for node in [n for n in graph if n.op_type == "Constant"]:
        output = node.outputs[0]
        content = ir.convenience.get_const_tensor(output)
        value = ir.Value(name=f"{output.name}.value", type=output.type, shape=output.shape, const_value=content)
        graph.register_initializer(value)
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)


@pytest.mark.parametrize("mask", ["y", "y, mask"])
@pytest.mark.parametrize(("ratio", "text"), [(0.5, "x, , t"), (0.25, "x, r, t"), (0.0, "x, r, t")])
def test_in_training_the_gradient_of_dropout_passes_where_the_value_was_kept(mask, ratio, text):
    x = 1 + np.abs(normal(4, 50, 3))
    body = f"{TRAINING} r = Constant <value_float = {ratio}> () {mask} = Dropout <seed = 7> ({text})"
    found = dropout(body, {"x": x})
    kept = found["value"] != 0
    assert abs(kept.mean() - (1 - ratio)) < 0.1
    np.testing.assert_allclose(found["grad"], kept / (1 - ratio), rtol=1e-6)
    np.testing.assert_allclose(found["value"], x * found["grad"], rtol=1e-6)


def test_equal_seeds_drop_the_same_elements():
    x = normal(4, 50)
    first, second, other = (dropout(f"{TRAINING} y = Dropout <seed = {s}> (x, , t)", {"x": x}) for s in (3, 3, 4))
    np.testing.assert_array_equal(first["grad"], second["grad"])
    assert not np.array_equal(first["grad"], other["grad"])


@pytest.mark.parametrize("text", ["(x)", "(x, r)", "(x, r, off)"])
def test_in_inference_dropout_is_the_identity(text):
    body = f"r = Constant <value_float = 0.4> () off = Constant <value = bool {{0}}> () y = Dropout {text}"
    found = dropout(body, {"x": normal(3, 4)})
    np.testing.assert_array_equal(found["grad"], np.ones((3, 4), np.float32))


def test_a_dropout_mode_that_is_computed_is_refused():
    inputs = {"x": normal(3, 4), "t": np.bool_(True)}
    model = graph_of("[drop] y = Dropout (x, , t)", inputs)
    with pytest.raises(ConversionError, match=r"Dropout 'drop' computes its input 2; .* set the ratio"):
        gradients(model, inputs, ["x"], normal(3, 4))
