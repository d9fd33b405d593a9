"""Gradients of batch normalisation against PyTorch's, with constant statistics and with those of the batch."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from gradient_cases import TOLERANCE, Arrays, autograd, check, check_differences, gradients, graph_of, normal, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lorac_exporters.gradients.normalization import write_out_batchnorm
from lorac_exporters.graph_tools import name_of, nodes_of
from lorac_runtime.errors import ConversionError

EPS = 1e-3
BODY = f"y = BatchNormalization <epsilon = {EPS}> (x, scale, bias, mean, var)"
SHAPES = [(6, 4), (3, 4, 5), (3, 4, 5, 6), (2, 3, 4, 2, 3), (4, 1, 3, 3), (1, 3, 4, 5), (16, 3)]
Reference = Callable[..., torch.Tensor]


def inputs_for(shape: tuple[int, ...]) -> Arrays:
    channels = shape[1]
    return {
        "x": 2 * normal(*shape) + np.arange(channels, dtype=np.float32).reshape(-1, *[1] * (len(shape) - 2)),
        "scale": normal(channels, seed=1),
        "bias": normal(channels, seed=2),
        "mean": normal(channels, seed=3),
        "var": np.abs(normal(channels, seed=4)) + 0.5,
    }


def with_statistics(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> torch.Tensor:
    scale, bias, mean, var = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (scale, bias, mean, var))
    return (x - mean) / torch.sqrt(var + EPS) * scale + bias


def with_batch_statistics(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(x, None, None, scale, bias, training=True, eps=EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wrt", [["x", "scale", "bias"], ["x"], ["scale"], ["bias"], ["x", "bias"]], ids=str)
def test_the_gradients_with_constant_statistics_are_pytorchs(shape: tuple[int, ...], wrt: list[str]) -> None:
    check(BODY, inputs_for(shape), with_statistics, wrt=wrt, fixed=["mean", "var"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wrt", [["x", "scale", "bias", "mean", "var"], ["mean"], ["var"]], ids=str)
def test_statistics_that_are_computed_otherwise_get_gradients_of_their_own(
    shape: tuple[int, ...], wrt: list[str]
) -> None:
    check(BODY, inputs_for(shape), with_statistics, wrt=wrt)


def check_written_out(body: str, inputs: Arrays, reference: Reference, wrt: list[str]) -> None:
    """Values and gradients of the written-out graph as PyTorch computes them in float64, and by differences."""

    def written_out() -> ir.Model:
        model = graph_of(body, inputs, fixed=[n for n in inputs if n.startswith(("mean", "var", "scale"))])
        write_out_batchnorm(model)
        return model

    (y,) = run(written_out(), inputs)
    cotangent = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
    expected, value = autograd(reference, inputs, wrt, cotangent)
    found = gradients(written_out(), inputs, wrt, cotangent)
    np.testing.assert_allclose(y, value, rtol=0, atol=TOLERANCE * max(1.0, np.abs(value).max()))
    for name in wrt:
        scale = max(np.abs(expected[name]).max(), 1e-2)
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, rtol=0, atol=TOLERANCE, err_msg=name)
    check_differences(written_out(), inputs, found, cotangent)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wrt", [["x", "scale", "bias"], ["x"], ["scale"], ["bias"], ["scale", "bias"]], ids=str)
def test_the_gradients_with_the_batchs_statistics_are_pytorchs(shape: tuple[int, ...], wrt: list[str]) -> None:
    check_written_out(BODY, inputs_for(shape), with_batch_statistics, wrt)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_the_gradients_with_the_statistics_of_any_batch_are_pytorchs(shape: list[int]) -> None:
    assume(np.prod(shape) // shape[1] >= 3)
    check_written_out(BODY, inputs_for(tuple(shape)), with_batch_statistics, ["x", "scale", "bias"])


def test_the_gradient_through_the_batchs_statistics_takes_four_passes_over_the_image_and_two_sums() -> None:
    inputs = inputs_for((3, 4, 5, 6))
    model = graph_of(BODY, inputs, fixed=["scale", "bias", "mean", "var"])
    write_out_batchnorm(model)
    before = len(model.graph)
    gradients(model, inputs, ["x", "scale", "bias"], normal(3, 4, 5, 6))
    added = [node for node in list(model.graph)[before:] if node.outputs[0].shape is not None]
    passes = [node.op_type for node in added if len(node.outputs[0].shape or ()) == 4]
    assert sorted(passes) == ["BatchNormalization", "BatchNormalization", "Mul", "Sub"]
    assert len([node for node in added if node.op_type == "ReduceSum"]) == 2


def test_a_variance_about_another_mean_is_not_taken_for_the_batchs() -> None:
    body = f"""
        d = Sub (x, kept)
        q = Mul (d, d)
        var = ReduceMean <keepdims = 0> (q, axes)
        mean = Reshape (kept, flat)
        y = BatchNormalization <epsilon = {EPS}> (x, scale, bias, mean, var)
    """

    def reference(x: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: torch.Tensor):
        return with_statistics(x, scale, bias, kept.reshape(-1), ((x - kept) ** 2).mean((0, 2)))

    inputs = {k: v for k, v in inputs_for((3, 4, 5)).items() if k not in ("mean", "var")}
    constants = {"axes": np.array([0, 2]), "flat": np.array([-1])}
    check(body, inputs | {"kept": normal(1, 4, 1, seed=7)} | constants, reference, fixed=list(constants))


NETWORK = f"""
    a = BatchNormalization <epsilon = {EPS}> (x, scale, bias, mean, var)
    r = Sigmoid (a)
    c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w)
    b = BatchNormalization <epsilon = {EPS}> (c, scale2, bias2, mean2, var2)
    y = Mul (b, b)
"""


def network_inputs() -> Arrays:
    second = {f"{name}2": value for name, value in inputs_for((4, 5, 3, 4)).items() if name != "x"}
    return inputs_for((4, 3, 6, 7)) | {"w": normal(5, 3, 3, 3, seed=5)} | second


def network(w: torch.Tensor, scale2: torch.Tensor, bias2: torch.Tensor, **first: torch.Tensor) -> torch.Tensor:
    hidden = torch.conv2d(torch.sigmoid(with_batch_statistics(**first)), w, stride=2, padding=1)
    return with_batch_statistics(hidden, scale2, bias2) ** 2


@pytest.mark.parametrize(
    "wrt", [["x"], ["scale"], ["w"], ["scale2", "bias2"], ["x", "scale", "bias", "w", "scale2", "bias2"]], ids=str
)
def test_gradients_pass_through_the_statistics_of_a_whole_network(wrt: list[str]) -> None:
    check_written_out(NETWORK, network_inputs(), network, wrt)


def statistics(body: str, inputs: Arrays) -> dict[str, list[np.ndarray]]:
    """By scale: mean and unbiased variance, as the graph computes them."""
    model = graph_of(body, inputs, fixed=[n for n in inputs if n != "x"])
    found = write_out_batchnorm(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [name_of(n.inputs[1]) for n in nodes_of(model.graph, "BatchNormalization")] == list(found)
    model.graph.outputs[:] = [value for one in found.values() for value in (one.mean, one.unbiased_var)]
    values = run(model, inputs)
    return {name: values[2 * i : 2 * i + 2] for i, name in enumerate(found)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_statistics_can_be_moved_as_pytorch_moves_them(shape: tuple[int, ...]) -> None:
    inputs, momentum = inputs_for(shape), 0.1
    mean, var = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("mean", "var"))
    functional.batch_norm(torch.tensor(inputs["x"], dtype=torch.float64), mean, var, training=True, momentum=momentum)
    found = statistics(BODY, inputs)["scale"]
    for name, stat, expected in zip(("mean", "var"), found, (mean, var), strict=True):
        moved = (1 - momentum) * inputs[name] + momentum * stat
        np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-6)


def test_every_batchnorm_of_a_network_has_its_statistics_under_its_scale() -> None:
    inputs = network_inputs()
    found = statistics(NETWORK, inputs)
    assert list(found) == ["scale", "scale2"]
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in inputs.items()}
    first = {k: tensors[k] for k in ("x", "scale", "bias")}
    hidden = torch.conv2d(torch.sigmoid(with_batch_statistics(**first)), tensors["w"], stride=2, padding=1)
    np.testing.assert_allclose(found["scale2"][0], hidden.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found["scale2"][1], hidden.var((0, 2, 3)), rtol=1e-5)


def test_one_graph_serves_any_batch_size() -> None:
    inputs = inputs_for((4, 3, 5))
    model = graph_of(BODY, inputs, fixed=["scale", "bias", "mean", "var"])
    found = write_out_batchnorm(model)["scale"]
    model.graph.outputs[:] = [found.unbiased_var, model.graph.outputs[0]]
    for batch in (1, 2, 7):
        x = normal(batch, 3, 5, seed=batch)
        var, y = run(model, {"x": x})
        np.testing.assert_allclose(var, x.var((0, 2), ddof=1), rtol=1e-5)
        assert y.shape == x.shape


def test_one_value_per_channel_has_no_variance() -> None:
    _, var = statistics(BODY, inputs_for((1, 3)))["scale"]
    assert np.isnan(var).all()


def test_running_statistics_are_read_no_more() -> None:
    model = graph_of(NETWORK, network_inputs(), fixed=[n for n in network_inputs() if n != "x"])
    write_out_batchnorm(model)
    held = ("mean", "var", "mean2", "var2")
    assert [len(model.graph.initializers[name].uses()) for name in held] == [0, 0, 0, 0]


def test_training_mode_is_refused_by_name() -> None:
    body = "y, m, v = BatchNormalization <training_mode = 1> (x, scale, bias, mean, var)"
    inputs = inputs_for((3, 4, 5))
    with pytest.raises(ConversionError, match=r"BatchNormalization .* training mode"):
        write_out_batchnorm(graph_of(body, inputs))
    with pytest.raises(ConversionError, match=r"BatchNormalization .* training mode"):
        gradients(graph_of(body, inputs), inputs, ["x"], normal(3, 4, 5))


def test_a_scale_of_two_batchnorms_is_refused_by_name() -> None:
    body = "a = BatchNormalization (x, scale, bias, mean, var) y = BatchNormalization (a, scale, bias, mean, var)"
    with pytest.raises(ConversionError, match=r"shares its scale 'scale'"):
        write_out_batchnorm(graph_of(body, inputs_for((3, 4, 5))))
