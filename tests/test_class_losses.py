"""ONNX's own losses, and GatherElements, in a loss graph: values and gradients against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradient_cases import check, graph_of, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lorac_exporters.gradients.class_losses import WRITTEN_OUT
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
REDUCTIONS = ("mean", "sum", "none")


def written_out(body: str, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient of its sum with respect to x) of a graph whose losses are written out."""
    model = graph_of(body, inputs)
    graph, tape = model.graph, Tape(model.graph)
    node = next(node for node in graph if node.op_type in WRITTEN_OUT)
    found = WRITTEN_OUT[node.op_type](tape, node, list(node.inputs))
    graph.remove(node)
    total = found[0] if not found[0].shape else tape.op("ReduceSum", found[0], shape=(), attributes={"keepdims": 0})
    value = next(v for v in graph.inputs if v.name == "x")
    (gradient,) = differentiate(tape, total, [value])
    graph.outputs[:] = [found[0], gradient]
    loss, slope = run(model, inputs)
    return loss, slope


def in_pytorch(loss: Callable[[Tensor], Tensor], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given_ = torch.from_numpy(x).double().requires_grad_()
    value = loss(given_)
    (gradient,) = torch.autograd.grad(value.sum(), given_)
    return value.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore", [None, 1, -100, 255])
def test_softmax_cross_entropy_is_that_of_pytorch(reduction: str, weighted: bool, ignore: int | None) -> None:
    x, labels = normal(3, 4, 5), np.random.default_rng(0).integers(0, 4, (3, 5))
    if ignore is not None:
        labels[0, :2] = ignore
    weights = np.array([0.5, 1.0, 2.0, 0.25], np.float32)
    attributes = f'reduction = "{reduction}"' + ("" if ignore is None else f", ignore_index = {ignore}")
    inputs = {"x": x, "labels": labels} | ({"w": weights} if weighted else {})
    body = f"y = SoftmaxCrossEntropyLoss <{attributes}> ({', '.join(inputs)})"
    weight = torch.from_numpy(weights).double() if weighted else None
    expected = in_pytorch(
        lambda v: functional.cross_entropy(
            v, torch.from_numpy(labels), weight, reduction=reduction, ignore_index=-7 if ignore is None else ignore
        ),
        x,
    )
    for found, wanted in zip(written_out(body, inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_negative_log_likelihood_is_that_of_pytorch() -> None:
    x, labels = normal(4, 3), np.array([2, 0, 1, 0])
    found = written_out("y = NegativeLogLikelihoodLoss (x, labels)", {"x": x, "labels": labels})
    expected = in_pytorch(lambda v: functional.nll_loss(v, torch.from_numpy(labels)), x)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_a_mean_over_nothing_is_nothing() -> None:
    inputs = {"x": normal(2, 3), "labels": np.array([9, 9])}
    loss, gradient = written_out("y = SoftmaxCrossEntropyLoss <ignore_index = 9> (x, labels)", inputs)
    assert loss == 0
    assert not gradient.any()


def test_log_probabilities_are_the_second_output() -> None:
    inputs = {"x": normal(2, 3), "labels": np.array([1, 0])}
    model = graph_of("loss, y = SoftmaxCrossEntropyLoss (x, labels)", inputs)
    node = next(iter(model.graph))
    _, logs = WRITTEN_OUT["SoftmaxCrossEntropyLoss"](Tape(model.graph), node, list(node.inputs))
    model.graph.outputs[:] = [logs]
    model.graph.remove(node)
    np.testing.assert_allclose(
        run(model, inputs)[0], functional.log_softmax(torch.from_numpy(inputs["x"]), 1), atol=1e-6
    )


@SETTINGS
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    taken=st.integers(1, 6),
    axis=st.integers(-4, 3),
    seed=st.integers(0, 99),
)
def test_gathered_elements_get_their_gradients_back(sizes: list[int], taken: int, axis: int, seed: int) -> None:
    axis %= len(sizes)
    shape = [*sizes]
    shape[axis] = taken
    places = np.random.default_rng(seed).integers(-sizes[axis], sizes[axis], shape)
    body = f"y = GatherElements <axis = {axis}> (x, i)"

    def reference(x: Tensor, i: Tensor) -> Tensor:
        return torch.gather(x, axis, i % sizes[axis])

    check(body, {"x": normal(*sizes), "i": places}, reference, wrt=["x"], batch=False)


@pytest.mark.parametrize("name", ["Atan", "Cos", "Sin"])
def test_waves_and_angles(name: str) -> None:
    check(f"y = {name} (x)", {"x": normal(3, 7)}, getattr(torch, name.lower()))
