"""int8: each operator against its formula on both runtimes, and what a quantized network is made of."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from tflite_int8_cases import CASES, SHAPE, Builder, conv, conv_options, images, linear
from tflite_reference import evaluate, float_ranges, steps_apart
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers

from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.quantize import quantize
from lorac_exporters.tflite.quantize_rules import FIXED, FREE, SAME_SCALE, WEIGHTED, parameters
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ConversionError
from lorac_runtime.quantization import bias_scales, quantized_bias, quantized_weight, weight_scales

EVERYWHERE = (*RUNTIMES, *PLAIN_KERNELS)


@functools.cache
def quantized(case: str) -> tuple[Network, bytes, np.ndarray, dict[str, np.ndarray]]:
    """A case in int8, its file, its images, and what the float32 network makes of them."""
    network = CASES[case]()
    x = images(shape=network.inputs[0].shape[1:])
    before = evaluate(network, x)
    report = quantize(network, float_ranges(network, x))
    assert report.float_operators == (), "the case is meant to run in int8 as a whole"
    return network, to_bytes(network), x, before


@pytest.mark.parametrize("runtime", EVERYWHERE)
@pytest.mark.parametrize("case", CASES)
def test_an_int8_operator_is_within_one_step_of_its_formula(case: str, runtime: str) -> None:
    network, content, x, _ = quantized(case)
    expected = evaluate(network, x)
    for i, (found, tensor) in enumerate(zip(answers(runtime, content, x), network.outputs, strict=True)):
        assert found.shape == expected[tensor.name].shape
        assert steps_apart(network, found, expected[tensor.name], i) < 1.01


@pytest.mark.parametrize("case", sorted(set(CASES) - {"pad with minus infinity"}))
def test_an_int8_operator_is_near_the_float_one(case: str) -> None:
    network, _, x, before = quantized(case)
    after = evaluate(network, x)
    for tensor in network.outputs:
        spread = np.ptp(before[tensor.name])
        assert np.max(np.abs(after[tensor.name] - before[tensor.name])) < 0.03 * spread
        assert np.ptp(after[tensor.name]) > 0.9 * spread


def test_every_kind_in_the_table_has_a_case_that_is_compared_with_its_formula() -> None:
    compared = {operator.kind for make in CASES.values() for operator in make().operators}
    listed = {*WEIGHTED, *SAME_SCALE, *FIXED, *FREE}
    assert listed - compared == set()


@pytest.mark.parametrize("kind", ["EXP", "ABS"])
def test_an_operator_without_an_int8_form_runs_in_float32_and_is_reported(kind: str) -> None:
    b = Builder()
    b.conv(b.add(kind, [b.conv(b.x, 6, 1)], SHAPE), 4)
    network, x = b.net(), images()
    report = quantize(network, float_ranges(network, x))
    assert [label.split()[0] for label in report.float_operators] == [kind]
    assert report.int8_operators == 2
    kinds = [operator.kind for operator in network.operators]
    assert kinds == ["QUANTIZE", "CONV_2D", "DEQUANTIZE", kind, "QUANTIZE", "CONV_2D", "DEQUANTIZE"]
    expected = evaluate(network, x)[network.outputs[0].name]
    for runtime in EVERYWHERE:
        assert steps_apart(network, answers(runtime, to_bytes(network), x)[0], expected) < 1.01


def test_normalisation_of_raw_images_stays_in_float32() -> None:
    b = Builder(dtype="uint8")
    real = b.add("CAST", [b.x], SHAPE)
    scaled = b.add("MUL", [real, b.normal(6)], SHAPE, fused_activation_function="NONE")
    b.conv(b.add("ADD", [scaled, b.normal(6)], SHAPE, fused_activation_function="NONE"), 4)
    network = b.net()
    x = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    report = quantize(network, float_ranges(network, x))
    assert [label.split()[0] for label in report.float_operators] == ["CAST", "MUL", "ADD"]
    expected = evaluate(network, x)[network.outputs[0].name]
    for runtime in EVERYWHERE:
        assert steps_apart(network, answers(runtime, to_bytes(network), x)[0], expected) < 1.01


@pytest.mark.parametrize(("case", "axis"), [("conv", 0), ("depthwise", 3), ("linear", None)])
def test_weights_and_biases_are_stored_by_the_runtimes_own_formulas(case: str, axis: int | None) -> None:
    before, network = CASES[case](), quantized(case)[0]
    old = {t.name: t for t in before.constants()}
    operator = next(op for op in network.operators if op.kind in WEIGHTED)
    rule = WEIGHTED[operator.kind]
    data, weight, bias = (operator.inputs[i] for i in (rule.data, rule.weight, rule.bias))
    assert data is not None
    assert weight is not None
    assert bias is not None
    assert data.quantization is not None
    step = float(data.quantization.scale[0])
    first, second = old[weight.name], old[bias.name]
    scales = weight_scales(first.data, axis, second.data, step)
    assert_stored(weight, first, quantized_weight(first.data, scales, axis), scales, axis or 0)
    steps = bias_scales(scales, step)
    assert_stored(bias, second, quantized_bias(second.data, steps)[0], steps, 0)


def assert_stored(tensor: Tensor, before: Tensor, numbers: np.ndarray, scales: np.ndarray, axis: int) -> None:
    """Numbers and scales to the bit; name and source as they were."""
    assert tensor.quantization is not None
    np.testing.assert_array_equal(tensor.data, numbers)
    np.testing.assert_array_equal(tensor.quantization.scale, scales)
    assert not tensor.quantization.zero_point.any()
    assert tensor.quantization.axis == axis
    assert (tensor.name, tensor.source) == (before.name, before.source)
    assert tensor.source is not None


def test_a_weight_of_two_layers_becomes_two_constants_that_nobody_can_patch() -> None:
    b = Builder()
    first = b.conv(b.x, 6, 1)
    weight, bias = b.operators[0].inputs[1:]
    assert weight is not None
    assert bias is not None
    b.add("CONV_2D", [first, weight, bias], SHAPE, **conv_options())
    network = b.net()
    quantize(network, float_ranges(network, images()))
    layers = [op for op in network.operators if op.kind == "CONV_2D"]
    weights = [op.inputs[1] for op in layers]
    assert weights[0] is not weights[1]
    assert all(w is not None and w.source is None for w in weights)
    to_bytes(network)  # names are unique


def test_operands_stored_with_a_range_of_their_own_cannot_be_patched() -> None:
    network, *_ = quantized("mul constant")
    assert all(constant.source is None for constant in network.constants())


@pytest.mark.parametrize("case", ["max pool same", "concatenation", "maximum", "pad with a number", "channel shuffle"])
def test_operators_that_move_numbers_keep_their_scale(case: str) -> None:
    network, *_ = quantized(case)
    for operator in network.operators:
        if operator.kind in SAME_SCALE:
            int8 = [t for t in (*operator.inputs, *operator.outputs) if t is not None and t.dtype == "int8"]
            assert len({(float(t.quantization.scale[0]), int(t.quantization.zero_point[0])) for t in int8}) == 1


def test_a_range_always_holds_zero_exactly() -> None:
    for low, high in [(0.5, 2.0), (-3.0, -1.0), (-1.0, 1.0), (0.0, 0.0), (-1e-9, 5.0), (0.0, 1e-45), (-1e30, 1e30)]:
        found = parameters(low, high)
        scale, zero = float(found.scale[0]), int(found.zero_point[0])
        assert scale > 0
        assert -128 <= zero <= 127
        assert scale * (-128 - zero) <= min(low, 0) + 0.51 * scale
        assert scale * (127 - zero) >= max(high, 0) - 0.51 * scale


def test_a_missing_or_infinite_range_is_refused_by_name() -> None:
    known = float_ranges(conv(), images())
    output = conv().outputs[0].name
    with pytest.raises(ConversionError, match=f"'{output}' has no range"):
        quantize(conv(), {"x": known["x"]})
    with pytest.raises(ConversionError, match=rf"'{output}' ranges over .*not finite"):
        quantize(conv(), {**known, output: (0.0, float("inf"))})


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    network = linear()
    weight = network.operators[0].inputs[1]
    assert weight is not None
    assert weight.data is not None
    ranges = float_ranges(network, images(shape=(12,)))
    weight.data[0, 0] = np.nan
    with pytest.raises(ConversionError, match=rf"'{weight.name}' cannot be stored in int8: .*not finite"):
        quantize(network, ranges)


def test_a_network_with_nothing_to_quantize_is_refused() -> None:
    x, y = Tensor("x", (1, 4), batch_axis=0), Tensor("y", (1, 4), batch_axis=0)
    network = Network([Operator("EXP", [x], [y])], [x], [y], ("x",), ("y",))
    with pytest.raises(ConversionError, match="no operator of this model has an int8 form"):
        quantize(network, {"x": (0.0, 1.0), "y": (0.0, 1.0)})


@pytest.mark.parametrize("case", ["conv", "depthwise", "linear"])
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_a_channel_of_zeros_is_right_on_both_runtimes(case: str, bias: float) -> None:
    network = CASES[case]()
    weight, shift = network.operators[0].inputs[1:]
    assert weight is not None
    assert weight.data is not None
    assert shift is not None
    assert shift.data is not None
    (weight.data.T if case == "depthwise" else weight.data)[1] = 0
    shift.data[1] = bias
    x = images(shape=network.inputs[0].shape[1:])
    quantize(network, float_ranges(network, x))
    expected = evaluate(network, x)[network.outputs[0].name]
    for runtime in EVERYWHERE:
        assert steps_apart(network, answers(runtime, to_bytes(network), x)[0], expected) < 1.01


def test_a_deep_depthwise_network_in_int8_follows_the_float_one() -> None:
    network, x = inverted_residuals(), images(count=16)
    expected = evaluate(network, x)[network.outputs[0].name]
    quantize(network, float_ranges(network, x))
    for runtime in EVERYWHERE:
        found = answers(runtime, to_bytes(network), x)[0]
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def inverted_residuals() -> Network:
    """Expand, depthwise, project, add, four times, as MobileNetV2 does it; then the mean and a classifier."""
    b = Builder()
    x = b.conv(b.x, 8)
    for _ in range(4):
        wide = b.conv(x, 24, 1, act="RELU6")
        inputs = [wide, b.normal(1, 3, 3, 24), b.normal(24)]
        deep = b.add("DEPTHWISE_CONV_2D", inputs, (9, 8, 24), depth_multiplier=1, **conv_options(act="RELU6"))
        x = b.add("ADD", [b.conv(deep, 8, 1), x], (9, 8, 8), fused_activation_function="NONE")
    mean = b.add("MEAN", [x, b.constant(np.int32([1, 2]))], (8,), keep_dims=False)
    b.add("FULLY_CONNECTED", [mean, b.normal(10, 8), b.normal(10)], (10,), fused_activation_function="NONE")
    return b.net()
