"""Models that cannot be adapted are refused with every obstacle named."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import constants, from_text, numbers

from lorac_exporters.support import check_supported
from lorac_runtime.errors import ConversionError

HEAD = " g = GlobalAveragePool (last) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
CONV = "last = Conv (x, c.weight)"
WEIGHTS = numbers(c_weight=(4, 3, 3, 3), fc_weight=(5, 4), fc_bias=(5,))


def message(model: ir.Model) -> str:
    with pytest.raises(ConversionError) as caught:
        check_supported(model)
    return str(caught.value)


def test_a_plain_cnn_is_accepted() -> None:
    check_supported(from_text(CONV + HEAD, weights=WEIGHTS))


BODIES = {
    "quantized activations": (
        "q = QuantizeLinear (x, scale) d = DequantizeLinear (q, scale) last = Conv (d, c.weight)",
        "the float model it was made from",
    ),
    "an operator of a vendor": (CONV.replace("last", "a") + " last = com.microsoft.Gelu (a)", "com.microsoft"),
    "BN in training mode": (
        "a = Conv (x, c.weight) last, m, v = BatchNormalization <training_mode = 1> (a, s, s, s, s)",
        "evaluation mode",
    ),
    "dropout in training mode": (
        "a = Conv (x, c.weight) last = Dropout (a, ratio, yes)",
        "evaluation mode",
    ),
    "a branch": (
        "a = Conv (x, c.weight) last = If (yes) <then_branch = t () => (z) {z = Relu (a)}, "
        "else_branch = e () => (w) {w = Neg (a)}>",
        "control flow",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_operators_that_cannot_be_adapted_are_named_with_advice(name: str) -> None:
    body, advice = BODIES[name]
    weights = WEIGHTS | numbers(s=(4,)) | constants(scale=0.1, ratio=0.5) | {"yes": np.array(True)}
    if "com.microsoft" in body:
        model = from_text(CONV.replace("last", "a") + " last = Relu (a)" + HEAD, weights=weights)
        model.graph[1].domain = "com.microsoft"
    else:
        model = from_text(body + HEAD, weights=weights)
    assert advice in message(model)


def test_a_dropout_that_says_it_is_not_training_is_accepted() -> None:
    body = "no = Constant <value = bool {0}> () a = Conv (x, c.weight) last = Dropout (a, ratio, no)" + HEAD
    check_supported(from_text(body, weights=WEIGHTS | constants(ratio=0.5)))


INTERFACES = {
    "two inputs": ({"x": "float[b,3,8,8] x, float[b] z"}, "2 inputs (x, z)"),
    "two outputs": ({"y": "float[b,5] y, float[b,4] f"}, "2 outputs (y, f)"),
    "bytes": ({"x": "uint8[b,3,8,8] x"}, "'x' is uint8, expected float32"),
    "half precision": ({"x": "float16[b,3,8,8] x"}, "'x' is float16, expected float32"),
    "no sample": ({"x": "float[b] x"}, "expected (batch, channels, height, width)"),
    "a volume": ({"x": "float[b,3,8,8,8] x"}, "(batch, features) of signals"),
    "any size": ({"x": "float[b,3,h,w] x"}, "all sizes but the batch must be numbers"),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_inputs_and_outputs_of_another_kind_are_refused(name: str) -> None:
    interface, text = INTERFACES[name]
    assert text in message(from_text(CONV + HEAD, weights=WEIGHTS, **interface))


def test_channels_last_is_refused_with_the_option_of_the_usual_converter() -> None:
    body = "t = Transpose <perm = [0, 3, 1, 2]> (x) last = Conv (t, c.weight)"
    model = from_text(body + HEAD, weights=WEIGHTS, x="float[b,8,8,3] x")
    assert "--inputs-as-nchw" in message(model)


def test_half_precision_weights_are_refused_with_their_names() -> None:
    weights = {k: v.astype(np.float16) for k, v in WEIGHTS.items()}
    model = from_text(CONV + HEAD, weights=weights, x="float16[b,3,8,8] x", y="float16[b,5] y")
    text = message(model)
    assert "3 weights are float16 (c.weight, fc.weight, fc.bias ...)" in text
    assert "float32 model" in text


def test_a_model_without_any_layer_is_refused() -> None:
    model = from_text("f = Flatten (x) y = Relu (f)", weights={}, y="float[b,192] y")
    assert "neither a convolution nor a fully connected layer" in message(model)


@pytest.mark.parametrize("shape", ["b,12", "b,3,4"])
def test_a_fully_connected_model_of_signals_is_accepted(shape: str) -> None:
    weights = numbers(fc_weight=(5, 12), fc_bias=(5,))
    body = "f = Flatten (x) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
    check_supported(from_text(body, weights=weights, x=f"float[{shape}] x"))


def test_another_opset_is_refused_with_the_function_that_converts() -> None:
    model = from_text(CONV + HEAD, weights=WEIGHTS)
    model.graph.opset_imports[""] = 13
    assert "opset 13, expected 18" in message(model)


def test_all_obstacles_come_in_one_message() -> None:
    body = "q = QuantizeLinear (x, scale) d = DequantizeLinear (q, scale) y = GlobalAveragePool (d)"
    model = from_text(body, weights=constants(scale=0.1), x="float[b,3,h,8] x", y="float[b,3,1,1] y, uint8[b,3,h,8] q")
    lines = message(model).splitlines()
    assert lines[0] == "this model cannot be adapted:"
    assert len(lines) == 6


def test_models_made_here_are_valid() -> None:
    """Else a refusal might be for another reason than the one tested."""
    onnx.checker.check_model(ir.to_proto(from_text(CONV + HEAD, weights=WEIGHTS)), full_check=True)
