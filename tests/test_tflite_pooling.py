"""Pools and reductions: the same numbers as onnxruntime and PyTorch; a maximum never chooses padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, assert_close, channels_last, check, graph, kinds, node, normal, only, positive
from tflite_runtimes import RUNTIMES, answers
from torch.nn import functional

from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=60)


def pool(op: str, before: str = "", **attributes: object) -> str:
    return f"{before} {node(op, 'v' if before else 'x', **attributes)}"


@pytest.mark.parametrize(
    ("size", "attributes", "operators"),
    [
        ((8, 8), {"kernel_shape": (2, 2), "strides": (2, 2)}, ["MAX_POOL_2D"]),
        ((7, 7), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}, ["MAX_POOL_2D"]),
        ((7, 8), {"kernel_shape": (2, 2), "strides": (2, 2), "ceil_mode": 1}, ["MAX_POOL_2D"]),
        ((8, 8), {"kernel_shape": (3, 3), "strides": (2, 2), "ceil_mode": 1}, ["MAX_POOL_2D"]),
        ((8, 8), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}, ["PADV2", "MAX_POOL_2D"]),
        ((6, 6), {"kernel_shape": (3, 2), "pads": (2, 0, 0, 1)}, ["PADV2", "MAX_POOL_2D"]),
    ],
)
def test_a_maximum_never_chooses_padding(
    size: tuple[int, int], attributes: dict[str, object], operators: list[str]
) -> None:
    inputs = {"x": -positive(1, 3, *size)}
    assert kinds(check(pool("MaxPool", **attributes), inputs, runtimes=EVERYWHERE)) == operators


@pytest.mark.parametrize(
    "before",
    [
        "v = Relu (x)",
        "v = Sigmoid (x)",
        "v = Clip (x, zero)",
        "r = Relu (x) v = MaxPool <kernel_shape = [1, 1]> (r)",
        "r = Relu (x) s = Sigmoid (x) v = Concat <axis = 1> (r, s)",
    ],
)
def test_where_no_number_is_negative_a_maximum_is_padded_with_zeros(before: str) -> None:
    body = pool("MaxPool", before, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    network = check(body, {"x": normal(1, 3, 8, 8), "zero": np.float32(0)})
    assert "PAD" in kinds(network)
    assert "PADV2" not in kinds(network)


@pytest.mark.parametrize(
    "before", ["v = Clip (x, low)", "r = Relu (x) v = Concat <axis = 1> (r, x)", "v = LeakyRelu (x)"]
)
def test_a_number_that_may_be_negative_is_never_hidden_by_zeros(before: str) -> None:
    body = pool("MaxPool", before, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    network = check(body, {"x": -positive(1, 3, 8, 8), "low": np.float32(-1)})
    assert "PADV2" in kinds(network)


def windows(draw: st.DrawFn, rank: int) -> tuple[dict[str, object], list[int]]:
    """Attributes and sizes; every window holds a number."""
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    pads = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    size = [draw(st.integers(k, 9)) for k in kernel]
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": draw(st.integers(0, 1))}
    return attributes, size


@SETTINGS
@given(st.data(), st.integers(1, 2), st.booleans())
def test_maxima_of_any_geometry_are_onnxs_or_refused(data: st.DataObject, rank: int, known: bool) -> None:
    attributes, size = windows(data.draw, rank)
    body = pool("MaxPool", "v = Relu (x)" if known else "", **attributes)
    _check_or_refused(body, {"x": normal(1, 2, *size)})


@SETTINGS
@given(st.data(), st.integers(1, 2), st.integers(0, 1))
def test_averages_of_any_geometry_are_onnxs_or_refused(data: st.DataObject, rank: int, counting: int) -> None:
    attributes, size = windows(data.draw, rank)
    _check_or_refused(pool("AveragePool", count_include_pad=counting, **attributes), {"x": normal(1, 2, *size)})


def _check_or_refused(body: str, inputs: dict[str, np.ndarray]) -> None:
    try:
        lower(graph(body, inputs))
    except ConversionError:
        assert "ceil_mode = 1" in body  # no other form is ever refused
        return
    check(body, inputs)


@SETTINGS
@given(st.data(), st.booleans(), st.booleans())
def test_averages_are_pytorchs(data: st.DataObject, ceil: bool, counting: bool) -> None:
    draw = data.draw
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    strides, pads = [draw(st.integers(1, 3)) for _ in range(2)], [draw(st.integers(0, k // 2)) for k in kernel]
    x = normal(2, 2, *(draw(st.integers(k, 9)) for k in kernel))
    expected = functional.avg_pool2d(torch.from_numpy(x), kernel, strides, pads, ceil, counting).numpy()
    body = pool(
        "AveragePool",
        kernel_shape=kernel,
        strides=strides,
        pads=pads * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(counting),
    )
    try:
        network = lower(graph(body, {"x": x}))
    except ConversionError:
        assume(False)
    for runtime in RUNTIMES:
        (found,) = answers(runtime, to_bytes(network), channels_last(x))
        assert_close(found, channels_last(expected))


@pytest.mark.parametrize(
    ("attributes", "operators"),
    [
        ({"kernel_shape": (2, 2), "strides": (2, 2)}, ["AVERAGE_POOL_2D"]),
        ({"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}, ["AVERAGE_POOL_2D"]),  # SAME counts what ONNX counts
        ({"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "count_include_pad": 1}, ["PAD", "AVERAGE_POOL_2D"]),
        ({"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "strides": (2, 2)}, ["PAD", "AVERAGE_POOL_2D", "MUL"]),
        ({"kernel_shape": (8, 8)}, ["MEAN"]),
    ],
)
def test_averages_take_no_more_operators_than_they_need(attributes: dict[str, object], operators: list[str]) -> None:
    network = check(pool("AveragePool", **attributes), {"x": normal(1, 3, 8, 8)}, runtimes=EVERYWHERE)
    assert kinds(network) == operators


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = MaxPool <kernel_shape = [2, 2], dilations = [2, 1]> (x)", "gaps"),
        ("v, i = MaxPool <kernel_shape = [2, 2]> (x) c = Cast <to = 1> (i) y = Mul (v, c)", "places of the maxima"),
        ("y = MaxPool <kernel_shape = [2, 2], strides = [3, 3], ceil_mode = 1> (x)", "outside the image"),
        ("y = AveragePool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1> (x)", "disagree"),
    ],
)
def test_pools_that_tflite_cannot_do_are_refused_by_name(body: str, why: str) -> None:
    with pytest.raises(ConversionError, match=f"Pool .*{why}"):
        lower(graph(body, {"x": normal(1, 3, 6, 6)}))


REDUCTIONS = ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare"]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[1], [2], [-1], [2, 3], [1, 3], [1, 2, 3]])
@pytest.mark.parametrize("kind", ["Mean", "Max"])
def test_reductions_over_any_axes_need_no_transposition_but_of_the_result(
    kind: str, axes: list[int], keep: int
) -> None:
    body = f"y = Reduce{kind} <keepdims = {keep}> (x, axes)"
    network = check(body, {"x": normal(1, 3, 5, 4), "axes": np.array(axes)})
    assert kinds(network)[0] in ("MEAN", "REDUCE_MAX")
    assert set(kinds(network)[1:]) <= {"TRANSPOSE"}  # the outputs of a network lie channels-last


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_every_kind_of_reduction_is_onnxs(kind: str) -> None:
    body = f"y = Reduce{kind} <keepdims = 0> (x, axes)"
    check(body, {"x": normal(1, 3, 3, 4), "axes": np.array([2, 3])}, runtimes=EVERYWHERE)


def test_the_logarithm_of_a_sum_is_onnxs() -> None:
    check("y = ReduceLogSum (x, axes)", {"x": positive(1, 3, 3, 4), "axes": np.array([1])})


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 3, 5)])
@pytest.mark.parametrize(
    "after", ["y = Flatten (p)", "y = Reshape (p, target)", "y = Squeeze (p, axes)", "y = Identity (p)"]
)
def test_global_pooling_is_one_operator_also_when_flattened(op: str, shape: tuple[int, ...], after: str) -> None:
    axes = np.arange(2, len(shape))
    inputs = {"x": normal(*shape), "target": np.array([-1, 3]), "axes": axes}
    network = check(f"p = {op} (x) {after}", inputs, runtimes=EVERYWHERE)
    assert kinds(network) == ["MEAN" if "Average" in op else "REDUCE_MAX"]
    assert network.outputs[0].name == "y"
    assert only(network, kinds(network)[0]).options["keep_dims"] == ("Identity" in after)


def test_a_pooled_image_that_is_read_twice_keeps_its_axes() -> None:
    again = "m = Mul (x, p) q = GlobalAveragePool (m) g = Flatten (q)"
    body = f"p = GlobalAveragePool (x) f = Flatten (p) {again} y = Add (f, g)"
    assert kinds(check(body, {"x": normal(1, 3, 5, 4)})) == ["MEAN", "RESHAPE", "MUL", "MEAN", "ADD"]


@pytest.mark.parametrize("body", ["y = ReduceMean (x, axes)", "y = ReduceSum <keepdims = 0> (x)"])
def test_reductions_across_the_batch_are_refused(body: str) -> None:
    with pytest.raises(ConversionError, match=r"Reduce.* across the samples"):
        lower(graph(body, {"x": normal(1, 3, 5), "axes": np.array([0, 2])}))
