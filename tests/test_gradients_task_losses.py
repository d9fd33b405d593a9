"""Losses of other tasks and their gradients against PyTorch in float64, for any shape and any missing labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import normal, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lorac_exporters.gradients import task_losses
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape
from lorac_runtime.tasks import IGNORED

TOLERANCE = 4e-6
KINDS = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
Append = Callable[[Tape, dict[str, ir.Value]], ir.Value]
Reference = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def check(append: Append, reference: Reference, inputs: dict[str, np.ndarray]) -> None:
    """Loss and gradient of ``x`` as torch's, to `TOLERANCE` of the largest element, or of what a position weighs."""
    values = {
        n: ir.Value(name=n, type=ir.TensorType(KINDS[str(v.dtype)]), shape=ir.Shape(["batch", *v.shape[1:]]))
        for n, v in inputs.items()
    }
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": 18}, name="g")
    tape = Tape(graph)
    loss = append(tape, values)
    graph.outputs[:] = [loss, *differentiate(tape, loss, [values["x"]])]
    found, gradient = run(ir.Model(graph, ir_version=9), inputs)
    wide = {n: torch.tensor(v, dtype=torch.float64 if v.dtype == np.float32 else None) for n, v in inputs.items()}
    wide["x"].requires_grad_()
    expected = reference(wide)
    expected.backward()
    assert wide["x"].grad is not None
    np.testing.assert_allclose(found, expected.item(), rtol=4e-6, atol=TOLERANCE)
    scale = max(float(wide["x"].grad.abs().max()), inputs["x"].shape[1] / inputs["x"].size)
    np.testing.assert_allclose(gradient / scale, wide["x"].grad.numpy() / scale, rtol=0, atol=TOLERANCE)


def labelled(shape: list[int], missing: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    return np.where(rng.random(labels.shape) < missing, IGNORED, labels)


def chosen(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the labels, of positions that have one."""
    kept = labels != IGNORED
    return functional.log_softmax(x, 1).movedim(1, -1)[kept].gather(-1, labels[kept][:, None])[:, 0]


shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4)
sizes = st.sampled_from([0.01, 1.0, 30.0, 1000.0])
shares = st.sampled_from([0.0, 0.3, 1.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes, size=sizes, missing=shares, smoothing=st.floats(0, 1), seed=st.integers(0, 9))
def test_cross_entropy_leaves_out_what_has_no_label(
    shape: list[int], size: float, missing: float, smoothing: float, seed: int
) -> None:
    def reference(given: dict[str, torch.Tensor]) -> torch.Tensor:
        if (given["labels"] == IGNORED).all():
            return 0 * given["x"].sum()  # where torch has no number
        options = {"ignore_index": IGNORED, "label_smoothing": smoothing}
        return functional.cross_entropy(given["x"], given["labels"], **options)

    def append(tape: Tape, v: dict[str, ir.Value]) -> ir.Value:
        return task_losses.labelled_cross_entropy(tape, v["x"], v["labels"], ignore=IGNORED, smoothing=smoothing)

    check(append, reference, {"x": size * normal(*shape), "labels": labelled(shape, missing, seed)})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=shapes,
    size=sizes,
    missing=shares,
    gamma=st.sampled_from([0.0, 1.0, 1.5, 2.0, 5.0]),
    seed=st.integers(0, 9),
)
@example(shape=[4, 3, 2], size=1000.0, missing=0.3, gamma=0.0, seed=0)
@example(shape=[4, 3, 2], size=1000.0, missing=0.3, gamma=1.0, seed=0)
@example(shape=[3, 1], size=1.0, missing=0.0, gamma=1.5, seed=0)
def test_focal_is_its_formula(shape: list[int], size: float, missing: float, gamma: float, seed: int) -> None:
    def reference(given: dict[str, torch.Tensor]) -> torch.Tensor:
        logs = chosen(given["x"], given["labels"])
        doubt = -torch.expm1(logs)
        sure = doubt <= 1e-30  # there the loss and its gradient are zero for every gamma
        weighted = torch.where(sure, 0 * logs, torch.where(sure, 1.0, doubt) ** gamma * -logs)
        return weighted.sum() / max(1, len(logs))

    def append(tape: Tape, v: dict[str, ir.Value]) -> ir.Value:
        return task_losses.focal(tape, v["x"], v["labels"], gamma=gamma, ignore=IGNORED)

    check(append, reference, {"x": size * normal(*shape), "labels": labelled(shape, missing, seed)})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=shapes,
    size=st.sampled_from([0.01, 1.0, 30.0]),
    missing=shares,
    weight=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_distillation_is_its_formula(
    shape: list[int], size: float, missing: float, weight: float, temperature: float, seed: int
) -> None:
    def reference(given: dict[str, torch.Tensor]) -> torch.Tensor:
        soft, known = (functional.log_softmax(given[n] / temperature, 1) for n in ("x", "base"))
        divergence = (known.exp() * (known - soft)).sum(1).mean()
        first = -chosen(given["x"], given["labels"]).sum() / given["labels"].numel()
        return (1 - weight) * first + weight * temperature**2 * divergence

    def append(tape: Tape, v: dict[str, ir.Value]) -> ir.Value:
        return task_losses.distillation(
            tape, v["x"], v["base"], v["labels"], weight=weight, temperature=temperature, ignore=IGNORED
        )

    x, base = size * normal(*shape), size * np.flip(normal(*shape)).copy()
    check(append, reference, {"x": x, "base": base, "labels": labelled(shape, missing, seed)})


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_l1_is_the_mean_distance(shape: list[int]) -> None:
    x = normal(*shape)
    check(
        lambda tape, v: task_losses.l1(tape, v["x"], v["y"]),
        lambda given: functional.l1_loss(given["x"], given["y"]),
        {"x": x[:, None] if x.ndim == 1 else x, "y": np.flip(x[:, None] if x.ndim == 1 else x).copy()},
    )


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])  # others below 1 are refused: their slope has no end
def test_sure_answers_leave_the_gradient_of_focal_finite(gamma: float) -> None:
    values = {"x": np.array([[200, 0, 0], [0, 1, 0]], np.float32), "labels": np.array([0, 1])}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3]))
    labels = ir.Value(name="labels", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    graph = ir.Graph([x, labels], [], nodes=[], opset_imports={"": 18}, name="g")
    tape = Tape(graph)
    loss = task_losses.focal(tape, x, labels, gamma=gamma)
    graph.outputs[:] = [loss, *differentiate(tape, loss, [x])]
    _, gradient = run(ir.Model(graph, ir_version=9), values)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0]).max() == 0
    assert np.abs(gradient[1]).max() > 0.1
