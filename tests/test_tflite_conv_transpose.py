"""Transposed convolutions: the same numbers as onnxruntime, at every batch size of one file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tflite_cases import (
    EVERYWHERE,
    Arrays,
    assert_close,
    channels_last,
    check,
    check_sources,
    graph,
    kinds,
    network_of,
    node,
    normal,
)
from tflite_runtimes import answers
from torch.nn.functional import conv_transpose2d

from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=60)


def transposed(*, bias: bool = True, **attributes: object) -> str:
    return node("ConvTranspose", "x, w, b" if bias else "x, w", **attributes)


def tensors(c_in: int, c_out: int, size: tuple[int, ...], kernel: tuple[int, ...], *, groups: int = 1) -> Arrays:
    w = normal(c_in, c_out // groups, *kernel, seed=1)
    return {"x": normal(1, c_in, *size), "w": w, "b": normal(c_out, seed=2)}


@pytest.mark.parametrize(
    ("size", "kernel", "attributes", "operators"),
    [
        ((3, 4), (2, 2), {"strides": (2, 2)}, ["CONV_2D", "DEPTH_TO_SPACE", "ADD"]),
        (
            (3, 4),
            (4, 4),
            {"strides": (2, 2), "pads": (1, 1, 1, 1)},
            ["PAD", "CONV_2D", "DEPTH_TO_SPACE", "SLICE", "ADD"],
        ),
        ((3, 4), (3, 3), {"pads": (1, 1, 1, 1)}, ["PAD", "CONV_2D"]),
        ((5,), (2,), {"strides": (2,)}, ["RESHAPE", "CONV_2D", "RESHAPE", "ADD", "RESHAPE"]),
    ],
)
def test_transposed_convolutions_are_convolutions_and_moves(
    size: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, object], operators: list[str]
) -> None:
    network = check(transposed(**attributes), tensors(3, 5, size, kernel), runtimes=EVERYWHERE)
    assert kinds(network) == operators


def test_an_activation_joins_the_sum_with_the_bias() -> None:
    body = transposed(strides=(2, 2)).replace("y =", "v =") + " y = Relu (v)"
    assert kinds(check(body, tensors(3, 5, (3, 4), (2, 2)))) == ["CONV_2D", "DEPTH_TO_SPACE", "ADD"]


@SETTINGS
@given(st.data(), st.integers(1, 2), st.sampled_from([1, 1, 2]), st.booleans())
def test_transposed_convolutions_of_any_geometry_answer_as_onnx_does(
    data: st.DataObject, rank: int, groups: int, bias: bool
) -> None:
    draw = data.draw
    numbers = []
    for _ in range(rank):
        stride, dilation = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
        more = draw(st.integers(0, stride - 1))
        numbers.append((draw(st.integers(1, 5)), draw(st.integers(1, 4)), stride, dilation, more))
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    size, kernel, strides, dilations, output_padding = (tuple(column) for column in zip(*numbers, strict=True))
    for axis, (n, k, s, d, more) in enumerate(numbers):
        assume(s * (n - 1) + more + (k - 1) * d + 1 > pads[axis] + pads[axis + rank])
    body = transposed(
        bias=bias, strides=strides, dilations=dilations, output_padding=output_padding, pads=pads, group=groups
    )
    inputs = tensors(4, 2 * groups, size, kernel, groups=groups)
    if not bias:
        del inputs["b"]
    check(body, inputs)


def test_rows_that_only_output_padding_adds_are_pytorchs() -> None:
    x, w = normal(2, 4, 3, 2), normal(4, 2, 1, 3, seed=1)  # onnxruntime 1.19 shifts numbers for dilation > stride
    attributes = {"dilations": (2, 2), "output_padding": (1, 1)}
    content = to_bytes(network_of(transposed(bias=False, **attributes), {"x": x, "w": w}))
    tensors = torch.from_numpy(x), torch.from_numpy(w)
    expected = conv_transpose2d(*tensors, dilation=2, output_padding=1).numpy()
    for runtime in EVERYWHERE:
        assert_close(answers(runtime, content, channels_last(x))[0], channels_last(expected))


@pytest.mark.parametrize(("size", "kernel"), [((3, 4), (2, 2)), ((3, 4), (2, 3)), ((5,), (4,))])
def test_new_weights_can_be_written_where_the_kernel_is_as_large_as_the_stride(
    size: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    found = check_sources(graph(transposed(strides=kernel), tensors(3, 5, size, kernel)))
    assert set(found) == {"w", "b"}


def test_weights_that_were_rearranged_with_zeros_say_that_they_were() -> None:
    network = network_of(transposed(strides=(2, 2)), tensors(3, 5, (3, 4), (3, 3)))
    assert {t.source.name for t in network.constants() if t.source is not None} == {"b"}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("v = Mul (w, w) y = ConvTranspose (x, v, b)", "weight 'v' is computed"),
        ('y = ConvTranspose <auto_pad = "SAME_UPPER"> (x, w, b)', "auto_pad"),
        ("y = ConvTranspose <output_shape = [7, 7]> (x, w, b)", "output_shape"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(body: str, why: str) -> None:
    with pytest.raises(ConversionError, match=f"ConvTranspose .*{why}"):
        lower(graph(body, tensors(3, 4, (6, 6), (2, 2))))


def test_transposed_convolutions_in_three_dimensions_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"ConvTranspose .* 3 spatial axes"):
        lower(graph(transposed(), tensors(3, 4, (4, 4, 4), (2, 2, 2))))
