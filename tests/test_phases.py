"""Gradients kept apart by their phase of the stride: summed, interleaved and trimmed against plain numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest
from gradient_cases import normal, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.phases import add_phases, can_split, interleave
from lorac_exporters.gradients.rule import Phased
from lorac_exporters.gradients.tape import Tape, dims

Phase = tuple[int, ...]


def blank(size: tuple[int, ...]) -> tuple[ir.Model, Tape, ir.Value]:
    """A graph without nodes, and a value of the gradient's shape (batch, 2, *size)."""
    like = ir.Value(name="like", shape=ir.Shape(["batch", 2, *size]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="phases")
    return ir.Model(graph, ir_version=9), Tape(graph), like


def phased(tape: Tape, like: ir.Value, strides: Phase, phases: list[Phase], seed: int) -> tuple[Phased, dict]:  # type: ignore[type-arg]
    """Inputs of the graph for the phases, and random numbers for them."""
    size = [math.ceil(n / s) for n, s in zip(dims(like)[2:], strides, strict=True)]
    names = {phase: f"phase{seed}_{''.join(map(str, phase))}" for phase in phases}
    values = {phase: tape.input(name, ("batch", 2, *size)) for phase, name in names.items()}
    numbers = {name: normal(3, 2, *size, seed=seed + i) for i, name in enumerate(names.values())}
    return Phased(strides, values, like), numbers


def expected(size: tuple[int, ...], strides: Phase, given: dict[str, np.ndarray]) -> np.ndarray:
    """Every phase at its places, the rest zero."""
    whole = np.zeros((3, 2, *(math.ceil(n / s) * s for n, s in zip(size, strides, strict=True))), np.float32)
    for name, numbers in given.items():
        offsets = [int(digit) for digit in name.rpartition("_")[2]]
        whole[(..., *(slice(r, None, s) for r, s in zip(offsets, strides, strict=True)))] += numbers
    return whole[(..., *(slice(n) for n in size))]


def woven(model: ir.Model, tape: Tape, value: Phased, numbers: dict[str, np.ndarray]) -> np.ndarray:
    result = interleave(tape, value)
    model.graph.outputs.append(result)
    assert dims(result) == dims(value.like)
    return run(model, numbers)[0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, ...], Phase, list[Phase]]:
    axes = draw(st.integers(1, 3))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    size = tuple(draw(st.integers(1, 7)) for _ in range(axes))
    every = list(itertools.product(*map(range, strides)))
    return size, strides, draw(st.lists(st.sampled_from(every), min_size=1, unique=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_phases_go_to_their_places_and_absent_ones_are_zero(
    problem: tuple[tuple[int, ...], Phase, list[Phase]],
) -> None:
    size, strides, phases = problem
    model, tape, like = blank(size)
    value, numbers = phased(tape, like, strides, phases, seed=1)
    np.testing.assert_array_equal(woven(model, tape, value, numbers), expected(size, strides, numbers))


@pytest.mark.parametrize("others", [[(0, 0)], [(0, 0), (1, 1)], [(1, 1)], [(0, 1), (1, 0)]])
def test_a_sum_has_the_phases_of_both(others: list[Phase]) -> None:
    size, strides = (5, 4), (2, 2)
    model, tape, like = blank(size)
    one, first = phased(tape, like, strides, [(0, 0), (1, 0)], seed=10)
    other, second = phased(tape, like, strides, others, seed=20)
    total = add_phases(tape, one, other)
    assert total.phases.keys() == {(0, 0), (1, 0), *others}
    whole = expected(size, strides, first) + expected(size, strides, second)
    np.testing.assert_array_equal(woven(model, tape, total, first | second), whole)


def test_an_axis_without_stride_costs_nothing() -> None:
    model, tape, like = blank((4, 6))
    value, numbers = phased(tape, like, (1, 2), [(0, 0), (0, 1)], seed=1)
    assert woven(model, tape, value, numbers).shape == (3, 2, 4, 6)
    assert sorted(node.op_type for node in model.graph) == ["Concat", "Reshape", "Unsqueeze", "Unsqueeze"]


@pytest.mark.parametrize(("dilations", "able"), [([1, 1], True), ([2, 1], False)])
def test_dilated_convolutions_are_not_split(dilations: list[int], able: bool) -> None:
    shapes = {"x": (1, 2, 9, 9), "w": (2, 2, 3, 3), "y": (1, 2, 3, 4)}
    x, w, y = (ir.Value(name=k, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT)) for k, s in shapes.items())
    node = ir.node("Conv", [x, w], {"strides": [2, 2], "dilations": dilations}, outputs=[y])
    assert can_split(Geometry.of(node)) == able
