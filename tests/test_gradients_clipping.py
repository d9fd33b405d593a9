"""Around the updates written as ONNX nodes: clipping against PyTorch's, packing, and what a step costs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from optimizer_graphs import CLOSE, Ours, blank, compiled, normal, results, value

from lorac_exporters.gradients.optimizers import clip_by_norm, groups, pack, unpack
from lorac_runtime.manifest import TrainingDefaults

# Clipping


def clipped(gradients: list[np.ndarray], max_norm: float) -> tuple[list[np.ndarray], float]:
    values = [value(f"g{i}", g.shape) for i, g in enumerate(gradients)]
    tape = blank(values)
    scaled, norm = clip_by_norm(tape, values, max_norm)
    outputs = [tape.op("Identity", v, like=v) for v in scaled]  # without a limit they are the inputs themselves
    session = compiled(tape, {**{f"c{i}": v for i, v in enumerate(outputs)}, "norm": norm})
    found = results(session, {f"g{i}": g for i, g in enumerate(gradients)})
    return [found[f"c{i}"] for i in range(len(gradients))], float(found["norm"])


def torch_clipped(gradients: list[np.ndarray], max_norm: float) -> tuple[list[np.ndarray], float]:
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm, foreach=False)
    return [t.grad.numpy() for t in tensors], float(norm)  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 0.0])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 40.0])
def test_clipping_is_that_of_clip_grad_norm(count: int, size: float, max_norm: float) -> None:
    gradients = [size * normal(20, 30 + i, seed=i) for i in range(count)]
    found, norm = clipped(gradients, max_norm)
    expected, torch_norm = torch_clipped(gradients, max_norm)
    assert norm == pytest.approx(torch_norm, rel=CLOSE)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=CLOSE)
    assert (np.abs(found[0] - gradients[0]).max() > 0) == (norm + 1e-6 > max_norm)


def test_without_a_limit_gradients_are_unchanged_and_their_norm_is_known() -> None:
    gradients = [100 * normal(5, seed=1), 100 * normal(3, 4, seed=2)]
    found, norm = clipped(gradients, 0.0)
    for ours, given_ in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(ours, given_)
    assert norm == pytest.approx(math.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients)), rel=CLOSE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_shows_in_the_norm(bad: float) -> None:
    gradients = [normal(5), np.array([1, bad], np.float32)]
    found, norm = clipped(gradients, 1.0)
    expected, torch_norm = torch_clipped(gradients, 1.0)
    np.testing.assert_equal(norm, torch_norm)
    np.testing.assert_equal(found[1][1], expected[1][1])


# Packing


@given(shapes=st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5))
@trials(max_examples=25, deadline=None, derandomize=True)
def test_packing_joins_in_order_and_unpacking_undoes_it(shapes: list[tuple[int, ...]]) -> None:
    values = [value(f"t{i}", s) for i, s in enumerate(shapes)]
    tape = blank(values)
    vector = pack(tape, values)
    assert vector.shape == ir.Shape([sum(math.prod(s) for s in shapes)])
    parts = unpack(tape, vector, values)
    assert [p.shape for p in parts] == [v.shape for v in values]
    wanted = {**{f"p{i}": part for i, part in enumerate(parts)}, "vector": vector}
    session = compiled(tape, {n: tape.op("Identity", v, like=v) for n, v in wanted.items()})
    inputs = {f"t{i}": normal(*s, seed=i) for i, s in enumerate(shapes)}
    found = results(session, {n: np.asarray(a, np.float32) for n, a in inputs.items()})
    np.testing.assert_array_equal(found["vector"], np.concatenate([np.ravel(a) for a in inputs.values()]))
    for i in range(len(shapes)):
        np.testing.assert_array_equal(found[f"p{i}"], inputs[f"t{i}"])


def test_small_tensors_share_the_first_group_and_large_ones_are_alone() -> None:
    shapes = {"big": (1 << 18,), "a": (3, 4), "huge": (1 << 10, 1 << 10), "b": ((1 << 18) - 1,)}
    assert groups(shapes) == [["a", "b"], ["big"], ["huge"]]
    assert groups({"big": (1 << 18,)}) == [["big"]]
    assert groups(shapes, large=1) == [["big"], ["a"], ["huge"], ["b"]]
    assert groups(shapes, large=1 << 30) == [list(shapes)]


def passes(settings: TrainingDefaults) -> int:
    """Nodes that compute a vector; views, joining and splitting do not count."""
    shapes: dict[str, tuple[int, ...]] = {"a": (8,), "b": (9,)}
    nodes = Ours(settings, shapes).graph
    done = [n for n in nodes if n.op_type not in ("Reshape", "Concat", "Split")]
    return sum(n.outputs[0].shape == ir.Shape([17]) for n in done)


def test_a_step_passes_over_a_vector_few_times() -> None:
    plain = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
    assert passes(plain) == 2
    assert passes(dataclasses.replace(plain, momentum=0.9)) == 4
    assert passes(TrainingDefaults()) == 13
