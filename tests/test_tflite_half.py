"""Weights as float16: the numbers of rounded weights exactly, on both runtimes."""

from __future__ import annotations

import numpy as np
import pytest
from tflite_int8_cases import CASES, Builder, conv, images, with_constant
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers

from lorac_exporters.tflite.half import to_half
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.quantize_rules import WEIGHTED
from lorac_exporters.tflite.schema import from_bytes, to_bytes

LAYERS = ("conv", "conv relu", "conv grouped", "depthwise", "linear")


def rounded(network: Network) -> Network:
    """The same network with weights rounded to float16, stored as float32."""
    for operator in network.operators:
        if operator.kind in WEIGHTED:
            weight = operator.inputs[WEIGHTED[operator.kind].weight]
            assert weight is not None
            assert weight.data is not None
            weight.data = weight.data.astype(np.float16).astype(np.float32)
    return network


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
@pytest.mark.parametrize("case", LAYERS)
def test_answers_are_those_of_rounded_weights_in_float32(case: str, runtime: str) -> None:
    network, x = CASES[case](), images(shape=CASES[case]().inputs[0].shape[1:])
    to_half(network)
    found = answers(runtime, to_bytes(network), x)[0]
    expected = answers(runtime, to_bytes(rounded(CASES[case]())), x)[0]
    np.testing.assert_array_equal(found, expected)
    exact = answers(runtime, to_bytes(CASES[case]()), x)[0]
    assert 0 < np.abs(found - exact).max() < 1e-2


def test_weights_keep_name_and_source_and_biases_stay_float32() -> None:
    before, network = conv(), conv()
    weight, bias = before.operators[0].inputs[1:]
    assert weight is not None
    assert bias is not None
    report = to_half(network)
    stored = {t.name: t for t in network.constants()}
    assert report.tensors == (weight.name,)
    assert stored[weight.name].dtype == "float16"
    assert stored[weight.name].source == weight.source
    np.testing.assert_array_equal(stored[weight.name].data, weight.data.astype(np.float16))  # type: ignore[union-attr]
    np.testing.assert_array_equal(stored[bias.name].data, bias.data)  # type: ignore[arg-type]
    assert stored[bias.name].dtype == "float32"
    assert stored[bias.name].source == bias.source


def test_the_file_is_little_more_than_half_as_large() -> None:
    def large() -> Network:
        b = Builder()
        b.conv(b.conv(b.x, 64), 64)
        return b.net()

    half = large()
    to_half(half)
    assert len(to_bytes(half)) < 0.53 * len(to_bytes(large()))


def test_numbers_too_large_become_the_largest_and_are_counted() -> None:
    network = conv()
    weight = network.operators[0].inputs[1]
    assert weight is not None
    assert weight.data is not None
    weight.data.flat[:4] = [65504, 65519.996, 65520, -1e9]
    report = to_half(network)
    assert report.saturated == {weight.name: 2}
    stored = next(t for t in network.constants() if t.dtype == "float16")
    assert stored.data is not None
    assert stored.data.flat[:4].tolist() == [65504, 65504, 65504, -65504]


def test_operands_of_other_operators_stay_float32() -> None:
    network = with_constant("MUL")
    assert to_half(network).tensors == ()
    assert to_bytes(network) == to_bytes(with_constant("MUL"))


def test_a_file_with_half_weights_is_read_back() -> None:
    network = conv()
    to_half(network)
    assert to_bytes(from_bytes(to_bytes(network), "a file")) == to_bytes(network)


def test_a_weight_of_two_layers_is_stored_once() -> None:
    b = Builder()
    first = b.conv(b.x, 6, 1)
    b.conv(first, 6, 1)
    b.operators[1].inputs[1] = b.operators[0].inputs[1]
    network = b.net()
    assert len(to_half(network).tensors) == 1
    assert [op.kind for op in network.operators] == ["DEQUANTIZE", "CONV_2D", "CONV_2D"]


def test_a_weight_that_another_operator_reads_too_stays_float32() -> None:
    b = Builder()
    both = b.normal(6, 6)
    rows = b.add("MEAN", [b.x, b.constant(np.int32([1, 2]))], (6,), keep_dims=False)
    made = b.add("FULLY_CONNECTED", [rows, both, b.normal(6)], (6,), fused_activation_function="NONE")
    squared = b.add("MUL", [both, both], (6, 6), fused_activation_function="NONE")
    squared.shape, squared.batch_axis = (6, 6), None
    network = b.net(made, squared)
    assert to_half(network).tensors == ()
    to_bytes(network)  # names are unique
