"""Losses and their gradients against torch.nn.functional."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import normal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lorac_exporters.gradients import losses
from lorac_exporters.gradients.losses import LOSSES
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape, dims

SHAPES = [(4, 3), (1, 10), (5, 2), (3, 1), (2, 5, 7), (2, 3, 4, 5)]
TOLERANCE = 2e-6


def graph_input(name: str, shape: tuple[int, ...], kind: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["batch", *shape[1:]]))


def model_of(append: Callable[[Tape, ir.Value, ir.Value | None], ir.Value], inputs: dict[str, np.ndarray]) -> ir.Model:
    """Outputs: the loss, and its gradient with respect to ``x``; ``append`` is given x and the other input, if any."""
    kinds = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
    values = [graph_input(name, v.shape, kinds[str(v.dtype)]) for name, v in inputs.items()]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 18}, name="g")
    tape = Tape(graph)
    loss = append(tape, values[0], values[1] if len(values) > 1 else None)
    assert dims(loss) == ()
    graph.outputs[:] = [loss, *differentiate(tape, loss, values[:1])]
    return ir.Model(graph, ir_version=9)


def torch_loss(name: str, x: torch.Tensor, labels: torch.Tensor | None, smoothing: float) -> torch.Tensor:
    if name == "cross_entropy":
        return functional.cross_entropy(x, labels, label_smoothing=smoothing)
    if name == "entropy":
        return torch.distributions.Categorical(logits=x.movedim(1, -1)).entropy().mean()
    assert labels is not None
    hot = functional.one_hot(labels, x.shape[1]).movedim(-1, 1).double()
    targets = hot * (1 - smoothing) + smoothing / x.shape[1]
    if name == "mse":
        return functional.mse_loss(x, targets)
    return functional.binary_cross_entropy_with_logits(x, targets)


def labels_for(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).integers(0, shape[1], (shape[0], *shape[2:]))


def check(name: str, x: np.ndarray, smoothing: float = 0.0, tolerance: float = TOLERANCE) -> None:
    """Loss and gradient as torch's in float64, to ``tolerance`` of the largest element, or of what a sample weighs."""
    labels = None if name == "entropy" else labels_for(x.shape)
    inputs = {"x": x} if labels is None else {"x": x, "labels": labels}
    model = model_of(lambda tape, value, given: LOSSES[name](tape, value, given, smoothing), inputs)
    loss, gradient = run(model, inputs)
    wide = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = torch_loss(name, wide, None if labels is None else torch.tensor(labels), smoothing)
    expected.backward()
    assert wide.grad is not None
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-6, atol=tolerance)
    assert gradient.shape == x.shape
    scale = max(float(wide.grad.abs().max()), x.shape[1] / x.size)
    np.testing.assert_allclose(gradient / scale, wide.grad.numpy() / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_loss_and_its_gradient_are_pytorchs(name: str, shape: tuple[int, ...]) -> None:
    check(name, 3 * normal(*shape))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "entropy"])
@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 10), (2, 3, 4, 5)], ids=str)
def test_smoothed_labels_give_pytorchs_loss(name: str, smoothing: float, shape: tuple[int, ...]) -> None:
    check(name, 3 * normal(*shape), smoothing)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits_give_finite_and_right_gradients(name: str, size: float, smoothing: float) -> None:
    x = size * np.array([[1, -1, 0], [-1, 1, 1], [0.5, 0.25, -1], [1, 1, 1]], np.float32)
    check(name, x, 0.0 if name == "entropy" else smoothing)


@pytest.mark.parametrize("name", LOSSES)
def test_small_logits_give_right_gradients(name: str) -> None:
    check(name, 1e-4 * normal(4, 6))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    smoothing=st.floats(0, 1),
)
def test_any_loss_of_any_shape_is_pytorchs(name: str, shape: list[int], size: float, smoothing: float) -> None:
    check(name, size * normal(*shape), 0.0 if name == "entropy" else smoothing)


@pytest.mark.parametrize(
    ("append", "reference"),
    [
        (losses.mean_squared_error, functional.mse_loss),
        (losses.binary_cross_entropy, functional.binary_cross_entropy_with_logits),
    ],
    ids=["mse", "binary_cross_entropy"],
)
def test_targets_may_be_any_numbers(append: Callable[..., ir.Value], reference: Callable[..., torch.Tensor]) -> None:
    inputs = {"x": normal(3, 4, 2), "target": np.random.default_rng(1).random((3, 4, 2)).astype(np.float32)}
    loss, gradient = run(model_of(append, inputs), inputs)
    x = torch.tensor(inputs["x"], dtype=torch.float64, requires_grad=True)
    expected = reference(x, torch.tensor(inputs["target"], dtype=torch.float64))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, x.grad, atol=1e-7)


def test_one_hot_puts_classes_on_axis_1() -> None:
    labels = labels_for((2, 3, 4))
    value = graph_input("labels", labels.shape, ir.DataType.INT64)
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 18}, name="g")
    targets = losses.one_hot(Tape(graph), value, 3)
    assert dims(targets) == ("batch", 3, 4)
    graph.outputs.append(targets)
    (found,) = run(ir.Model(graph, ir_version=9), {"labels": labels})
    np.testing.assert_array_equal(found, np.eye(3, dtype=np.float32)[labels].transpose(0, 2, 1))


def appended(name: str, smoothing: float, *shapes: tuple[int, ...]) -> ir.Value:
    kinds = (ir.DataType.FLOAT, ir.DataType.INT64)
    values = [graph_input(f"v{i}", shape, kinds[i]) for i, shape in enumerate(shapes)]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 18}, name="g")
    return LOSSES[name](Tape(graph), values[0], values[1] if len(values) > 1 else None, smoothing)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_labels_that_do_not_fit_the_logits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected the same"):
        appended(name, 0.0, (2, 3, 4, 4), (2,))
    with pytest.raises(ValueError, match="needs labels"):
        appended(name, 0.0, (2, 3))


def test_entropy_takes_no_labels_and_no_smoothing() -> None:
    with pytest.raises(ValueError, match="no labels"):
        appended("entropy", 0.0, (2, 3), (2,))
    with pytest.raises(ValueError, match="nothing to smooth"):
        appended("entropy", 0.1, (2, 3))


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_a_share_outside_0_to_1_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label smoothing is {smoothing}"):
        appended("cross_entropy", smoothing, (2, 3), (2,))


def test_logits_without_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'v0' have shape .*, expected \(batch, classes, ...\)"):
        appended("entropy", 0.0, (2,))
