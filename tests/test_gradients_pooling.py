"""Gradients of pooling and of reductions, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gradient_cases import check, gradients, graph_of, normal, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorac_exporters.gradients.tape import dims
from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def tied(*shape: int) -> np.ndarray:
    """Few different numbers, half of them zero: most windows have several largest cells."""
    return np.maximum(np.random.default_rng(3).integers(-2, 3, shape), 0).astype(np.float32)


def attributes(**numbers: object) -> str:
    return ", ".join(f"{name} = {value}" for name, value in numbers.items())


def pool_body(operator: str, **numbers: object) -> str:
    return f"y = {operator} <{attributes(**numbers)}> (x)"


def torch_window(kernel: list[int], stride: list[int], pad: list[int]) -> dict[str, list[int]]:
    return {"kernel_size": kernel, "stride": stride, "padding": pad}


@pytest.mark.parametrize("make", [normal, tied])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "pad"),
    [
        ((3, 4, 8, 8), 3, 2, 1),
        ((2, 3, 9, 7), 3, 2, 1),
        ((2, 3, 8, 6), 2, 2, 0),
        ((2, 3, 7, 9), 2, 2, 0),
        ((2, 2, 7, 7), 2, 3, 0),
        ((2, 3, 6, 6), 3, 1, 1),
        ((5, 2, 4, 4), 4, 4, 0),
        ((2, 3, 6, 5), 1, 2, 0),
        ((2, 3, 8, 8), 3, 3, 1),
        ((2, 3, 10, 9), 3, 3, 0),
        ((2, 3, 9, 9), 3, 3, 1),
        ((2, 3, 8, 8), 2, 2, 1),
    ],
)
def test_max_pooling_sends_the_gradient_to_the_first_largest_cell(
    make: Callable[..., np.ndarray], shape: tuple[int, ...], kernel: int, stride: int, pad: int
) -> None:
    body = pool_body("MaxPool", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    check(body, {"x": make(*shape)}, lambda x: F.max_pool2d(x, kernel, stride, pad), differences=False)


@pytest.mark.parametrize("make", [normal, tied])
@pytest.mark.parametrize(("shape", "kernel"), [((2, 3, 7, 8), 2), ((2, 3, 5), 2), ((2, 3, 6, 7), 4)])
def test_max_windows_beyond_the_image_count_what_they_hold(
    make: Callable[..., np.ndarray], shape: tuple[int, ...], kernel: int
) -> None:
    rank = len(shape) - 2
    body = pool_body("MaxPool", kernel_shape=[kernel] * rank, strides=[kernel] * rank, ceil_mode=1)
    pool = [F.max_pool1d, F.max_pool2d][rank - 1]
    check(body, {"x": make(*shape)}, lambda x: pool(x, kernel, ceil_mode=True), differences=False)


def same_outputs(body: str, x: np.ndarray, expected: tuple[int, ...]) -> bool:
    """Whether ONNX, onnxruntime and PyTorch agree on the number of windows; with ``ceil_mode`` some releases do not."""
    model = graph_of(body, {"x": x}, batch=False)
    return dims(model.graph.outputs[0]) == run(model, {"x": x})[0].shape == expected


def max_windows(draw: st.DrawFn, rank: int) -> tuple[list[int], ...]:
    """Sizes, kernel, strides, pads (the same at both ends, as PyTorch has it) and dilations."""
    sizes, kernel, strides, pads, dilations = [], [], [], [], []
    for _ in range(rank):
        kernel.append(draw(st.integers(1, 4)))
        dilations.append(draw(st.integers(1, 3)))
        strides.append(draw(st.integers(1, 4)))
        pads.append(draw(st.integers(0, kernel[-1] // 2)))
        covered = (kernel[-1] - 1) * dilations[-1] + 1
        sizes.append(draw(st.integers(max(1, covered - 2 * pads[-1]), covered + 6)))
    return sizes, kernel, strides, pads, dilations


@SETTINGS
@given(st.data(), st.integers(1, 2), st.booleans())
def test_max_pooling_of_any_geometry_has_pytorchs_gradient(data: st.DataObject, rank: int, ceil: bool) -> None:
    sizes, kernel, strides, pads, dilations = max_windows(data.draw, rank)
    x = tied(2, 2, *sizes)
    pool = [F.max_pool1d, F.max_pool2d][rank - 1]
    expected = pool(torch.tensor(x), kernel, strides, pads, dilations, ceil)
    assume(expected.isfinite().all())  # PyTorch's gradient of a window without a cell writes beyond its memory
    body = pool_body(
        "MaxPool", kernel_shape=kernel, strides=strides, pads=pads * 2, dilations=dilations, ceil_mode=int(ceil)
    )
    assume(same_outputs(body, x, tuple(expected.shape)))
    check(body, {"x": x}, lambda x: pool(x, kernel, strides, pads, dilations, ceil), differences=False)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "outputs", "operator"),
    [(2, 2, 0, 1, "MaxUnpool"), (2, 1, 0, 2, "ScatterElements"), (2, 2, 1, 2, "MaxUnpool"), (4, 4, 0, 2, "MaxUnpool")],
)
def test_only_windows_that_overlap_or_are_hard_to_search_change_the_forward_node(
    kernel: int, stride: int, pad: int, outputs: int, operator: str
) -> None:
    body = pool_body("MaxPool", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    x = normal(2, 3, 8, 8)
    model = graph_of(body, {"x": x})
    (y,) = run(model, {"x": x})
    gradients(model, {"x": x}, ["x"], np.ones_like(y))
    assert [node.op_type for node in nodes_of(model.graph, "MaxUnpool", "ScatterElements")] == [operator]
    assert len(nodes_of(model.graph, "MaxPool")[0].outputs) == outputs


@pytest.mark.parametrize(("kernel", "stride"), [(2, 1), (2, 2), (4, 4)])
def test_max_pooling_survives_numbers_that_are_not_numbers(kernel: int, stride: int) -> None:
    x = normal(2, 2, 4, 4)
    x[0, 0] = np.nan
    body = pool_body("MaxPool", kernel_shape=[kernel] * 2, strides=[stride] * 2)
    (y,) = run(graph_of(body, {"x": x}), {"x": x})
    found = gradients(graph_of(body, {"x": x}), {"x": x}, ["x"], np.ones_like(y))["x"]
    assert np.isfinite(found).all()
    assert found[1, 0].sum() == y[1, 0].size


def test_max_pooling_whose_indices_are_used_keeps_them() -> None:
    x = normal(2, 2, 4, 4)
    body = "y, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)"
    check(body, {"x": x}, lambda x: F.max_pool2d(x, 2), differences=False)


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "pad"),
    [
        ((3, 4, 8, 8), 2, 2, 0),
        ((2, 3, 8, 8), 3, 2, 1),
        ((2, 3, 7, 9), 3, 2, 1),
        ((2, 3, 6, 6), 3, 1, 1),
        ((2, 3, 7, 7), 2, 2, 0),
        ((2, 3, 9, 9), 2, 3, 0),
        ((2, 3, 7, 5), 7, 1, 3),
        ((2, 3, 4, 4), 4, 4, 0),
    ],
)
def test_the_gradient_of_average_pooling_is_pytorchs(
    shape: tuple[int, ...], kernel: int, stride: int, pad: int, counting: bool
) -> None:
    body = pool_body(
        "AveragePool",
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[pad] * 4,
        count_include_pad=int(counting),
    )
    check(
        body,
        {"x": normal(*shape)},
        lambda x: F.avg_pool2d(x, kernel, stride, pad, count_include_pad=counting),
    )


@SETTINGS
@given(st.data(), st.integers(1, 3), st.booleans(), st.booleans())
def test_average_pooling_of_any_geometry_has_pytorchs_gradient(
    data: st.DataObject, rank: int, ceil: bool, counting: bool
) -> None:
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    strides = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    pads = [data.draw(st.integers(0, k // 2)) for k in kernel]
    sizes = [data.draw(st.integers(k, k + 5)) for k in kernel]
    x = normal(2, 2, *sizes)
    pool = [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d][rank - 1]
    expected = pool(torch.tensor(x), kernel, strides, pads, ceil, counting)
    beyond = [
        (out - 1) * s + k - p > n + p
        for out, s, k, p, n in zip(expected.shape[2:], strides, kernel, pads, sizes, strict=True)
    ]
    assume(not (counting and any(beyond)))
    body = pool_body(
        "AveragePool",
        kernel_shape=kernel,
        strides=strides,
        pads=pads * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(counting),
    )
    assume(same_outputs(body, x, tuple(expected.shape)))
    check(body, {"x": x}, lambda x: pool(x, kernel, strides, pads, ceil, counting))


@pytest.mark.parametrize(("pads", "counting"), [([2, 0], 0), ([0, 1], 1), ([2, 1], 0), ([2, 1], 1)])
def test_average_pooling_with_different_pads_at_the_ends(pads: list[int], counting: int) -> None:
    body = pool_body("AveragePool", kernel_shape=[3], strides=[2], pads=pads, count_include_pad=counting)

    def reference(x: torch.Tensor) -> torch.Tensor:
        padded, ones = (F.pad(v, pads) for v in (x, torch.ones_like(x)))
        return F.avg_pool1d(padded, 3, 2) / (1 if counting else F.avg_pool1d(ones, 3, 2))

    check(body, {"x": normal(2, 3, 8)}, reference)


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"kernel_shape": [2], "strides": [2], "pads": [1, 0], "ceil_mode": 1, "count_include_pad": 1}, "disagree"),
        ({"kernel_shape": [2], "strides": [3], "pads": [1, 0], "ceil_mode": 1}, "outside the image"),
    ],
)
def test_average_windows_that_runtimes_disagree_on_are_refused(numbers: dict[str, object], why: str) -> None:
    x = normal(2, 2, 2)
    with pytest.raises(ConversionError, match=f"AveragePool.*{why}"):
        gradients(graph_of(pool_body("AveragePool", **numbers), {"x": x}), {"x": x}, ["x"], x)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 6), (2, 2, 3, 4, 2)])
def test_the_gradient_of_global_average_pooling_is_pytorchs(shape: tuple[int, ...]) -> None:
    axes = tuple(range(2, len(shape)))
    check("y = GlobalAveragePool (x)", {"x": normal(*shape)}, lambda x: x.mean(axes, keepdim=True))


@pytest.mark.parametrize("make", [normal, tied])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 6)])
def test_global_max_pooling_sends_the_gradient_to_the_first_largest_cell(
    make: Callable[..., np.ndarray], shape: tuple[int, ...]
) -> None:
    pool = F.max_pool1d if len(shape) == 3 else F.max_pool2d
    check("y = GlobalMaxPool (x)", {"x": make(*shape)}, lambda x: pool(x, shape[2:]), differences=False)


def norm(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keep)


REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL2": norm,
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep),
    "ReduceLogSumExp": torch.logsumexp,
}


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [(2, 3), (-1,), (1,), (3, 1), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("operator", REDUCTIONS)
def test_the_gradient_of_a_reduction_is_pytorchs(operator: str, axes: tuple[int, ...], keep: int) -> None:
    x = tied(2, 3, 4, 3) if operator in ("ReduceMax", "ReduceMin") else normal(2, 3, 4, 3)
    check(
        f"y = {operator} <keepdims = {keep}> (x, axes)",
        {"x": x, "axes": np.array(axes)},
        lambda x, axes: REDUCTIONS[operator](x, tuple(axes.tolist()), bool(keep)),
        fixed=["axes"],
        differences=operator not in ("ReduceMax", "ReduceMin"),
    )


@pytest.mark.parametrize("operator", REDUCTIONS)
def test_a_reduction_without_axes_is_one_over_all(operator: str) -> None:
    check(
        f"y = {operator} <keepdims = 0> (x)",
        {"x": normal(2, 3, 4)},
        lambda x: REDUCTIONS[operator](x, (0, 1, 2), False),
        differences=operator not in ("ReduceMax", "ReduceMin"),
    )


@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean", "ReduceMax"])
def test_a_reduction_over_no_axes_passes_the_gradient_on(operator: str) -> None:
    inputs = {"x": normal(2, 3, 4), "axes": np.array([], np.int64)}
    body = f"y = {operator} <noop_with_empty_axes = 1> (x, axes)"
    check(body, inputs, lambda x, axes: x.clone(), fixed=["axes"])


def test_a_norm_of_zeros_has_gradient_zero() -> None:
    x = normal(3, 4)
    x[1] = 0
    body = "y = ReduceL2 <keepdims = 0> (x, axes)"
    inputs = {"x": x, "axes": np.array([1])}
    check(body, inputs, lambda x, axes: norm(x, (1,), False), fixed=["axes"], differences=False)


def test_a_norm_over_no_axes_is_refused() -> None:
    x = normal(2, 3)
    with pytest.raises(ConversionError, match="reduces no axis"):
        gradients(graph_of("y = ReduceL2 <noop_with_empty_axes = 1> (x)", {"x": x}), {"x": x}, ["x"], x)


def test_axes_that_the_graph_computes_are_refused() -> None:
    inputs = {"x": normal(2, 3), "axes": np.array([1])}
    model = graph_of("y = ReduceSum (x, axes)", inputs)
    model.graph.outputs[0].shape = ir.Shape(["batch", 1])
    with pytest.raises(ConversionError, match=r"ReduceSum.*axes are computed"):
        gradients(model, inputs, ["x"], normal(2, 1))
