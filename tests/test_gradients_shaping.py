"""Gradients of operators that only move values, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gradient_cases import check, gradients, graph_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_exporters.gradients.moves import contract, reshape
from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
END = np.iinfo(np.int64).max
START = np.iinfo(np.int64).min + 1


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def check_fixed(body: str, x: np.ndarray, reference: Callable[..., torch.Tensor], **constants: np.ndarray) -> None:
    """As `check`, with constant inputs that the reference does not need."""
    check(body, {"x": x, **constants}, lambda x, **_: reference(x), wrt=["x"], fixed=list(constants))


def refusal(body: str, x: np.ndarray, match: str, *, batch: bool = True, **constants: np.ndarray) -> None:
    inputs = {"x": x, **constants}
    model = graph_of(body, inputs, fixed=list(constants), batch=batch)
    model.graph.outputs[0].shape = model.graph.outputs[0].shape or ir.Shape(["batch"])
    with pytest.raises(ConversionError, match=match):
        gradients(model, inputs, ["x"], x)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4, -1])
def test_the_gradient_of_flatten_has_the_shape_of_its_input(axis: int) -> None:
    x = normal(2, 3, 4, 5)
    rows = int(np.prod(x.shape[: axis if axis >= 0 else 3])) if axis else 1
    check_fixed(f"y = Flatten <axis = {axis}> (x)", x, lambda x: x.reshape(rows, -1))


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("shape", [(-1, 12), (0, -1), (-1, 3, 2, 2), (0, 2, 6), (-1,), (0, 2, 3, 2, 1)])
def test_the_gradient_of_reshape_has_the_shape_of_its_input(shape: tuple[int, ...], batch: bool) -> None:
    target = (2, *shape[1:]) if shape[0] == 0 else shape
    inputs = {"x": normal(2, 3, 4), "shape": ints(*shape)}
    check("y = Reshape (x, shape)", inputs, lambda x, shape: x.reshape(target), fixed=["shape"], batch=batch)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 0, 3, 2), (3, 1, 0, 2), (2, 0, 3, 1)])
def test_the_gradient_of_transpose_is_the_inverse_permutation(order: tuple[int, ...]) -> None:
    check_fixed(f"y = Transpose <perm = {list(order)}> (x)", normal(2, 3, 4, 5), lambda x: x.permute(order))


def test_transpose_without_an_order_reverses_the_axes() -> None:
    check_fixed("y = Transpose (x)", normal(2, 3, 4), lambda x: x.permute(2, 1, 0))


def test_the_gradients_of_squeeze_and_unsqueeze() -> None:
    x = normal(2, 1, 3, 1)
    check_fixed("y = Squeeze (x, axes)", x, lambda x: x[:, 0, :, 0], axes=ints(1, -1))
    check_fixed("y = Unsqueeze (x, axes)", x, lambda x: x[:, None, ..., None], axes=ints(1, -1))


@pytest.mark.parametrize("wrt", [["x"], ["b"], ["x", "b"], ["x", "b", "c"]])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_the_gradient_of_concat_is_cut_for_those_who_want_it(axis: int, wrt: list[str]) -> None:
    shapes = [[2, 3, 4], [2, 3, 4], [2, 3, 4]]
    for shape, size in zip(shapes, (3, 1, 2), strict=True):
        shape[axis] = size
    inputs = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(zip("xbc", shapes, strict=True))}
    body = f"y = Concat <axis = {axis}> (x, b, c)"
    check(body, inputs, lambda x, b, c: torch.cat([x, b, c], axis), wrt=wrt, batch=False)


def test_a_value_that_is_concatenated_with_itself_gets_both_gradients() -> None:
    check_fixed("y = Concat <axis = 1> (x, x)", normal(2, 3), lambda x: torch.cat([x, x], 1))


SLICES = [
    ([1], [3], [1], [1]),
    ([0, -3], [END, -1], [1, 2], [1, 1]),
    ([0, 0], [END, END], [2, 3], [2, 2]),
    ([1, 1], [END, 4], [2, 3], [2, 3]),
    ([-1], [START], [3], [-1]),
    ([-2, 4], [-100, 0], [2, 3], [-2, -1]),
    ([5], [0], [3], [-3]),
    ([0, 0], [END, 2], [0, -2], [1, 1]),
    ([0], [-100], [2], [-1]),
]


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES)
def test_the_gradient_of_slice_goes_to_where_it_was_cut_from(
    starts: list[int], ends: list[int], axes: list[int], steps: list[int]
) -> None:
    x = normal(2, 3, 5, 6)
    where: list[np.ndarray | slice] = [slice(None)] * 4
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where[axis] = np.arange(x.shape[axis])[slice(start, end, step)].copy()
    constants = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}

    def reference(x: torch.Tensor) -> torch.Tensor:
        for axis, cells in enumerate(where):
            if isinstance(cells, np.ndarray):
                x = x.index_select(axis, torch.tensor(cells))
        return x

    check_fixed("y = Slice (x, s, e, a, t)", x, reference, **constants)


@SETTINGS
@given(st.data(), st.integers(1, 9), st.sampled_from([-4, -3, -2, -1, 1, 2, 3, 4]))
def test_any_slice_has_pytorchs_gradient(data: st.DataObject, size: int, step: int) -> None:
    first, last = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    low, high = min(first, last), max(first, last)
    start, end = (low, high + 1) if step > 0 else (high, low - 1 if low else START)
    cells = torch.arange(low, high + 1, step) if step > 0 else torch.arange(high, low - 1, step)
    constants = {"s": ints(start), "e": ints(end), "a": ints(1), "t": ints(step)}
    check_fixed("y = Slice (x, s, e, a, t)", normal(2, size, 3), lambda x: x[:, cells], **constants)


def test_a_slice_of_the_batch_is_refused() -> None:
    refusal("y = Slice (x, s, e)", normal(4, 3), "axis 0, whose size is not known", s=ints(1), e=ints(3))


@pytest.mark.parametrize("missing", [False, True])
def test_the_gradient_of_split_is_put_together_again(missing: bool) -> None:
    body = "a, b, c = Split <axis = 1> (x, parts) y = " + ("Concat <axis = 1> (c, a)" if missing else "Sum (a, b, c)")

    def reference(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.split(2, 1)
        return torch.cat([c, a], 1) if missing else a + b + c

    if missing:
        check_fixed(body, normal(3, 6, 2), reference, parts=ints(2, 2, 2))
    else:
        body = "a, b, c = Split <axis = 1, num_outputs = 3> (x) y = Concat <axis = 2> (c, b, a)"
        check_fixed(body, normal(3, 6, 2), lambda x: torch.cat(x.split(2, 1)[::-1], 2))


PADS = [
    ((0, 0, 1, 2, 0, 0, 0, 1), "constant"),
    ((0, 1, 0, 0, 0, 2, 0, 0), "constant"),
    ((0, 0, -1, 2, 0, 0, 1, -2), "constant"),
    ((0, -1, 0, 0, 0, -1, 0, 0), "constant"),
    ((0, 0, 1, 2, 0, 0, 3, 1), "reflect"),
    ((0, 0, 1, 2, 0, 0, 3, 7), "edge"),
    ((0, 0, 0, -2, 0, 0, 0, 3), "edge"),
]


@pytest.mark.parametrize(("pads", "mode"), PADS)
def test_the_gradient_of_pad_is_pytorchs(pads: tuple[int, ...], mode: str) -> None:
    order = [pads[3], pads[7], pads[2], pads[6], *([pads[1], pads[5]] if mode == "constant" else [])]
    name = "replicate" if mode == "edge" else mode

    def reference(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, order, name, 1.5 if mode == "constant" else None)

    constants = {"pads": ints(*pads), "value": np.array(1.5, np.float32)}
    check_fixed(f'y = Pad <mode = "{mode}"> (x, pads, value)', normal(2, 3, 4, 5), reference, **constants)


def test_pad_of_named_axes() -> None:
    x = normal(2, 3, 4)
    constants = {"pads": ints(1, 0, 2, 3), "a": ints(-1, 1)}
    check_fixed("y = Pad (x, pads, , a)", x, lambda x: F.pad(x, [1, 2, 0, 3]), **constants)


def test_pads_without_a_rule_are_refused() -> None:
    x = normal(2, 3, 4)
    refusal('y = Pad <mode = "reflect"> (x, p)', x, "mode 'reflect' with widths", p=ints(0, 0, 1, 0, 0, -1))
    refusal("y = Pad (x, p)", x, "axis 0, whose size is not known", p=ints(1, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("shape", "target"),
    [((2, 1, 3), (1, 4, 1)), ((2, 3, 1, 1), (1, 1, 4, 5)), ((2, 1), (5, 1, 3)), ((2, 3), (2, 3)), ((1, 3), (4, 3))],
)
def test_the_gradient_of_expand_sums_the_copies(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    wide = np.broadcast_shapes(shape, target)
    inputs = {"x": normal(*shape), "t": ints(*target)}
    check("y = Expand (x, t)", inputs, lambda x, t: x.expand(wide), fixed=["t"], batch=shape[0] != 1)


@pytest.mark.parametrize("repeats", [(1, 2, 3), (1, 1, 2), (1, 1, 1), (3, 2, 1)])
def test_the_gradient_of_tile_sums_the_copies(repeats: tuple[int, ...]) -> None:
    check_fixed("y = Tile (x, r)", normal(2, 3, 4), lambda x: x.tile(repeats), r=ints(*repeats))


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0, 1], [1, 1, 0, 1], [-1], [[0, 2], [2, -3]], 1])
def test_the_gradient_of_gather_adds_up_what_was_taken_twice(axis: int, indices: object) -> None:
    numbers = np.array(indices, np.int64)
    flat = torch.tensor(numbers.reshape(-1) % 3)
    shape = [2, 3, 3, 3]
    shape[axis : axis + 1 or None] = numbers.shape

    def reference(x: torch.Tensor) -> torch.Tensor:
        return x.index_select(axis, flat).reshape(shape)

    check_fixed(f"y = Gather <axis = {axis}> (x, i)", normal(2, 3, 3, 3), reference, i=numbers)


def test_a_gather_that_only_reorders_has_a_gather_as_gradient() -> None:
    inputs = {"x": normal(2, 4, 3), "i": ints(2, 0, 3, 1)}
    model = graph_of("y = Gather <axis = 1> (x, i)", inputs, fixed=["i"])
    gradients(model, inputs, ["x"], inputs["x"])
    assert len(nodes_of(model.graph, "Gather")) == 2
    assert not nodes_of(model.graph, "MatMul")


def test_indices_that_the_graph_computes_are_refused() -> None:
    inputs = {"x": normal(2, 3), "i": ints(1, 0, 0)}
    with pytest.raises(ConversionError, match=r"Gather.*indices are computed by the graph"):
        gradients(graph_of("y = Gather <axis = 1> (x, i)", inputs), inputs, ["x"], inputs["x"])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_every_value_that_a_contraction_writes_has_its_shape(axis: int) -> None:
    shape: list[int | str] = [2, 3, 4, 5]
    size = [2, 3, 4, 5][axis]
    if axis:
        shape[0] = "batch"
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    tape = Tape(ir.Graph([x], [], nodes=[], opset_imports={"": 18}))
    y = contract(tape, x, axis, np.ones((size, 7), np.float32))
    assert dims(y) == (*shape[:axis], 7, *shape[axis + 1 :])


def test_two_unknown_sizes_cannot_be_reshaped_to() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["a", "b"]), type=ir.TensorType(ir.DataType.FLOAT))
    tape = Tape(ir.Graph([x], [], nodes=[], opset_imports={"": 18}))
    with pytest.raises(ConversionError, match="several sizes are not known"):
        reshape(tape, x, ("a", "b", 1))
