"""Convolutions: the same numbers as onnxruntime on both runtimes, with as few operators as TFLite allows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, Arrays, check, check_sources, graph, kinds, node, normal, only

from lorac_exporters.tflite.lower import lower
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=60)


def conv(**attributes: object) -> str:
    return node("Conv", "x, w, b", **attributes)


def tensors(c_in: int, c_out: int, size: tuple[int, ...], kernel: tuple[int, ...], *, groups: int = 1) -> Arrays:
    x, w = normal(1, c_in, *size), normal(c_out, c_in // groups, *kernel, seed=1)
    return {"x": x, "w": w, "b": normal(c_out, seed=2)}


@pytest.mark.parametrize(
    ("size", "kernel", "attributes", "padding"),
    [
        ((6, 7), (3, 3), {"pads": (1, 1, 1, 1)}, "SAME"),
        ((7, 9), (3, 3), {"pads": (1, 1, 1, 1), "strides": (2, 2)}, "SAME"),
        ((8, 8), (3, 3), {"pads": (0, 0, 1, 1), "strides": (2, 2)}, "SAME"),
        ((8, 7), (1, 1), {"strides": (2, 2)}, "VALID"),
        ((6, 7), (2, 3), {"pads": (0, 1, 1, 1)}, "SAME"),
        ((7, 7), (3, 3), {"pads": (2, 2, 2, 2), "dilations": (2, 2)}, "SAME"),
        ((9, 8), (3, 3), {}, "VALID"),
        ((8, 8), (2, 2), {"pads": (0, 0, 1, 1), "strides": (2, 2)}, "VALID"),  # no window reaches the padding
    ],
)
def test_padding_that_tflite_knows_is_not_written_out(
    size: tuple[int, int], kernel: tuple[int, int], attributes: dict[str, object], padding: str
) -> None:
    network = check(conv(**attributes), tensors(3, 4, size, kernel))
    assert kinds(network) == ["CONV_2D"]
    assert network.operators[0].options["padding"] == padding


@pytest.mark.parametrize(
    ("size", "attributes", "added"),
    [
        ((8, 8), {"pads": (1, 1, 1, 1), "strides": (2, 2)}, [[0, 0], [1, 0], [1, 0], [0, 0]]),
        ((6, 7), {"pads": (1, 0, 1, 2)}, [[0, 0], [1, 1], [0, 2], [0, 0]]),
        ((8, 7), {"pads": (1, 1, 0, 1), "strides": (2, 2)}, [[0, 0], [1, 0], [1, 1], [0, 0]]),
    ],
)
def test_other_padding_is_one_operator_that_adds_what_windows_need(
    size: tuple[int, int], attributes: dict[str, object], added: list[list[int]]
) -> None:
    network = check(conv(**attributes), tensors(3, 4, size, (3, 3)), runtimes=EVERYWHERE)
    assert kinds(network) == ["PAD", "CONV_2D"]
    paddings = network.operators[0].inputs[1]
    assert paddings is not None
    assert np.array_equal(paddings.data, added)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolutions_are_one_operator(groups: int, stride: int) -> None:
    inputs = tensors(6, 12, (7, 7), (3, 3), groups=groups)
    body = conv(pads=(1, 1, 1, 1), group=groups, strides=(stride, stride))
    network = check(body, inputs, runtimes=EVERYWHERE)
    (operator,) = network.operators
    weight = operator.inputs[1]
    assert weight is not None
    if groups == 6:
        assert (operator.kind, operator.options["depth_multiplier"]) == ("DEPTHWISE_CONV_2D", 2)
        assert weight.shape == (1, 3, 3, 12)
    else:
        assert (operator.kind, weight.shape) == ("CONV_2D", (12, 3, 3, 6 // groups))


def test_a_channel_of_its_own_for_one_input_channel_is_no_group() -> None:
    network = check(conv(pads=(1, 1, 1, 1), group=1), tensors(1, 3, (5, 5), (3, 3)))
    assert kinds(network) == ["CONV_2D"]


def sizes(draw: st.DrawFn, rank: int) -> tuple[dict[str, object], tuple[int, ...], tuple[int, ...]]:
    """Attributes, image size, kernel."""
    numbers = [
        (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 9)))
        for _ in range(rank)
    ]
    pads = [draw(st.integers(0, 3)) for _ in range(2 * rank)]
    kernel, strides, dilations, size = (tuple(column) for column in zip(*numbers, strict=True))
    for axis in range(rank):
        assume(size[axis] + pads[axis] + pads[axis + rank] > (kernel[axis] - 1) * dilations[axis])
    return {"strides": strides, "dilations": dilations, "pads": tuple(pads)}, size, kernel


@SETTINGS
@given(st.data(), st.integers(1, 2), st.sampled_from([1, 1, 2, 4]), st.integers(1, 2))
def test_convolutions_of_any_geometry_answer_as_onnx_does(
    data: st.DataObject, rank: int, groups: int, multiplier: int
) -> None:
    attributes, size, kernel = sizes(data.draw, rank)
    inputs = tensors(4, 4 * multiplier, size, kernel, groups=groups)
    runtimes = EVERYWHERE if data.draw(st.booleans()) else EVERYWHERE[:2]
    network = check(conv(group=groups, **attributes), inputs, runtimes=runtimes)
    assert "TRANSPOSE" not in kinds(network)


@pytest.mark.parametrize(
    ("groups", "rank", "shape", "permute"),
    [(1, 2, (8, 3, 3, 4), (0, 2, 3, 1)), (2, 2, (8, 3, 3, 2), (0, 2, 3, 1)), (4, 2, (1, 3, 3, 8), (1, 2, 3, 0))],
)
def test_new_weights_can_be_written_into_the_stored_ones(
    groups: int, rank: int, shape: tuple[int, ...], permute: tuple[int, ...]
) -> None:
    found = check_sources(graph(conv(group=groups), tensors(4, 8, (5, 5), (3, 3), groups=groups)))
    assert set(found) == {"w", "b"}
    assert found["w"].shape == shape
    assert found["w"].source is not None
    assert found["w"].source.permute == permute


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_new_weights_of_a_sequences_convolution_can_be_written_too(groups: int) -> None:
    found = check_sources(graph(conv(group=groups), tensors(4, 8, (9,), (3,), groups=groups)))
    assert set(found) == {"w", "b"}
    assert 1 in found["w"].shape  # height


def test_a_convolution_without_bias_gets_zeros() -> None:
    inputs = tensors(3, 4, (5, 5), (3, 3))
    del inputs["b"]
    network = check("y = Conv (x, w)", inputs)
    bias = only(network, "CONV_2D").inputs[2]
    assert bias is not None
    assert bias.source is None


def test_zeros_that_a_pad_puts_before_one_convolution_join_its_padding() -> None:
    inputs = tensors(3, 4, (7, 7), (3, 3)) | {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    body = conv(strides=(2, 2)).replace("x", "v")
    assert kinds(check(f"v = Pad (x, p) {body}", inputs)) == ["CONV_2D"]


@pytest.mark.parametrize(
    "body",
    [
        "v = Pad (x, p, one) y = Conv (v, w, b)",  # not zeros
        "v = Pad (x, p) c = Conv (v, w, b) d = AveragePool <kernel_shape = [9, 9]> (v) y = Mul (c, d)",  # read twice
        'v = Pad <mode = "reflect"> (x, p) y = Conv (v, w, b)',
    ],
)
def test_other_pads_stay_before_the_convolution(body: str) -> None:
    inputs = tensors(3, 3, (7, 7), (3, 3)) | {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)}
    assert only(check(body, inputs), "CONV_2D").options["padding"] == "VALID"


def test_a_chain_of_sequence_convolutions_is_reshaped_once() -> None:
    body = """
        c = Conv <pads = [1, 1]> (x, w, b) r = Relu (c) p = MaxPool <kernel_shape = [2], strides = [2]> (r)
        d = Conv <pads = [1, 1]> (p, w, b) s = Add (d, p) t = Sigmoid (s) y = Conv (t, w, b)
    """
    network = check(body, tensors(4, 4, (12,), (3,)))
    expected = ["RESHAPE", "CONV_2D", "MAX_POOL_2D", "CONV_2D", "ADD", "LOGISTIC", "CONV_2D", "RESHAPE"]
    assert kinds(network) == expected


@pytest.mark.parametrize("shape", [(4, 12), (1, 4, 1), (4, 1), ()])
def test_constants_of_any_shape_fit_a_sequence_as_an_image(shape: tuple[int, ...]) -> None:
    body = "c = Conv <pads = [1, 1]> (x, w, b) m = Mul (c, g) y = Conv (m, w, b)"
    inputs = tensors(4, 4, (12,), (3,)) | {"g": normal(*shape, seed=3)}
    assert kinds(check(body, inputs)) == ["RESHAPE", "CONV_2D", "MUL", "CONV_2D", "RESHAPE"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("v = Mul (w, w) y = Conv (x, v, b)", "weight 'v' is computed"),
        ("v = Mul (b, b) y = Conv (x, w, v)", "bias 'v' is computed"),
        ('y = Conv <auto_pad = "SAME_UPPER"> (x, w, b)', "auto_pad"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(body: str, why: str) -> None:
    with pytest.raises(ConversionError, match=f"Conv .*{why}"):
        lower(graph(body, tensors(3, 4, (6, 6), (3, 3))))


def test_negative_padding_is_refused() -> None:
    model = graph(conv(), tensors(3, 4, (6, 6), (3, 3)))
    model.graph[0].attributes["pads"] = ir.AttrInt64s("pads", [-1, 0, 1, 0])  # ONNX's shape inference refuses it too
    with pytest.raises(ConversionError, match=r"Conv .*negative"):
        lower(model)


def test_convolutions_in_three_dimensions_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"Conv .* 3 spatial axes"):
        lower(graph("y = Conv (x, w, b)", tensors(3, 4, (4, 4, 4), (2, 2, 2))))
