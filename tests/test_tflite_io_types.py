"""Inputs and outputs of int8 networks as float32, int8 or uint8: the same answers in other clothes."""

from __future__ import annotations

import numpy as np
import pytest
from tflite_int8_cases import SHAPE, Builder, conv, images
from tflite_reference import dequantized, float_ranges, rounded
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers

from lorac_exporters.tflite.io_types import set_io_types
from lorac_exporters.tflite.network import Network, Tensor
from lorac_exporters.tflite.quantize import quantize
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.tflite_config import IO_DTYPES, IoDtype
from lorac_runtime.errors import ConversionError


def int8_network(network: Network | None = None) -> Network:
    """Quantized, with float32 at both ends."""
    made = conv(act="RELU") if network is None else network
    quantize(made, float_ranges(made, images()))
    return made


def stored(real: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Real numbers as a quantized tensor holds them."""
    if tensor.quantization is None:
        return real
    numbers = rounded(real, tensor) / float(tensor.quantization.scale[0]) + int(tensor.quantization.zero_point[0])
    return np.rint(numbers).astype(tensor.dtype)


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
@pytest.mark.parametrize("output_dtype", IO_DTYPES)
@pytest.mark.parametrize("input_dtype", IO_DTYPES)
def test_every_dtype_gives_the_answers_of_float32(input_dtype: IoDtype, output_dtype: IoDtype, runtime: str) -> None:
    x = images()
    expected = answers(runtime, to_bytes(int8_network()), x)[0]
    network = int8_network()
    set_io_types(network, input_dtype=input_dtype, output_dtype=output_dtype)
    assert (network.inputs[0].dtype, network.outputs[0].dtype) == (input_dtype, output_dtype)
    found = answers(runtime, to_bytes(network), stored(x, network.inputs[0]))[0]
    assert found.dtype == output_dtype
    real = dequantized(found, network.outputs[0].quantization)
    np.testing.assert_allclose(real, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_names_stay_and_int8_needs_no_operator_at_either_end(dtype: IoDtype) -> None:
    before, network = int8_network(), int8_network()
    set_io_types(network, input_dtype=dtype, output_dtype=dtype)
    assert [t.name for t in network.inputs] == [t.name for t in before.inputs]
    assert [t.name for t in network.outputs] == [t.name for t in before.outputs]
    kinds = [operator.kind for operator in network.operators]
    ends = {"float32": ("QUANTIZE", "DEQUANTIZE"), "uint8": ("QUANTIZE", "QUANTIZE"), "int8": ()}[dtype]
    assert kinds == ([ends[0], "CONV_2D", ends[1]] if ends else ["CONV_2D"])


def shortcuts() -> Network:
    """Input and first output are read again by an operator that runs in float32."""
    b = Builder()
    first = b.conv(b.x, 6)
    both = b.add("EXP", [first], SHAPE)
    b.add("ADD", [both, b.add("EXP", [b.x], SHAPE)], SHAPE, fused_activation_function="NONE")
    last = b.conv(b.operators[-1].outputs[0], 3)
    return b.net(first, last)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_operators_in_float32_go_on_reading_inputs_and_outputs(dtype: IoDtype, runtime: str) -> None:
    network, reference = int8_network(shortcuts()), int8_network(shortcuts())
    set_io_types(network, input_dtype=dtype, output_dtype=dtype)
    set_io_types(reference, input_dtype=dtype, output_dtype="float32")
    x = stored(images(), network.inputs[0])
    expected = answers(runtime, to_bytes(reference), x)
    for found, tensor, real in zip(answers(runtime, to_bytes(network), x), network.outputs, expected, strict=True):
        np.testing.assert_allclose(dequantized(found, tensor.quantization), real, rtol=1e-6, atol=1e-6)


def test_an_output_computed_in_float32_is_refused_by_name() -> None:
    b = Builder()
    output = b.add("EXP", [b.conv(b.x, 6)], SHAPE)
    network = int8_network(b.net())
    with pytest.raises(ConversionError, match=f"output '{output.name}' is computed by EXP in float32"):
        set_io_types(network, input_dtype="float32", output_dtype="int8")


def test_raw_images_stay_raw() -> None:
    b = Builder(dtype="uint8")
    b.conv(b.add("CAST", [b.x], SHAPE), 4)
    network = b.net()
    x = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    quantize(network, float_ranges(network, x))
    set_io_types(network, input_dtype="uint8", output_dtype="float32")
    assert network.inputs[0].dtype == "uint8"
    with pytest.raises(ConversionError, match="input 'x' is uint8 and cannot be made int8"):
        set_io_types(network, input_dtype="int8", output_dtype="float32")
