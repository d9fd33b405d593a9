"""The dtypes in which an int8 network takes its input and gives its outputs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lorac_exporters.graph_tools import unique_name
from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor
from lorac_exporters.tflite_config import IoDtype
from lorac_runtime.errors import ConversionError

UNSIGNED = 128  # uint8 is int8 with its zero point moved by this


def set_io_types(network: Network, *, input_dtype: IoDtype, output_dtype: IoDtype) -> None:
    """Let a network that `quantize` made take and give ``float32``, ``int8`` or ``uint8``, in place; no inverse.

    Names stay. Apps find scale and zero point in the tensor: real = scale * (stored - zero_point). Inputs that are
    not float32 (raw uint8 images, normalised inside) stay as they are and go with any ``input_dtype`` of their own.

    Raises ConversionError if an input or output is not stored in int8 inside.
    """
    network.inputs = [_input(network, tensor, input_dtype) for tensor in network.inputs]
    network.outputs = [_output(network, tensor, output_dtype) for tensor in network.outputs]


def _input(network: Network, tensor: Tensor, dtype: IoDtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype != "float32":
        raise ConversionError(
            f"input {tensor.name!r} is {tensor.dtype} and cannot be made {dtype}: the graph starts so"
        )
    users = [operator for operator, _ in network.users(tensor)]
    entry = next((op for op in users if op.kind == "QUANTIZE"), None)
    if entry is None:
        raise ConversionError(f"input {tensor.name!r} is read in float32 only; it cannot be made {dtype}")
    stored = entry.outputs[0]
    given = _stored_as(stored, tensor.name, dtype)
    for operator in users:
        if operator is not entry:
            _read_instead(network, operator, tensor, given)
    if dtype == "int8":
        network.operators.remove(entry)
        _replace(network, stored, given)
    else:
        entry.inputs = [given]
    return given


def _read_instead(network: Network, operator: Operator, old: Tensor, given: Tensor) -> None:
    """An operator in float32 reads what the quantized input stands for."""
    name = unique_name(f"{old.name}_float32", {t.name for t in network.tensors()})
    real = dataclasses.replace(old, name=name)
    operator.inputs = [real if t is old else t for t in operator.inputs]
    network.operators.insert(network.operators.index(operator), Operator("DEQUANTIZE", [given], [real]))


def _output(network: Network, tensor: Tensor, dtype: IoDtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    last = network.producer(tensor)
    if last is None or last.kind != "DEQUANTIZE" or last.inputs[0] is None:
        kind = "an input" if last is None else f"computed by {last.kind} in float32"
        raise ConversionError(f"output {tensor.name!r} is {kind}; it cannot be made {dtype}")
    stored = last.inputs[0]
    result = _stored_as(stored, tensor.name, dtype)
    if dtype == "int8":
        _replace(network, stored, result)
    else:
        network.operators.insert(network.operators.index(last), Operator("QUANTIZE", [stored], [result]))
    if list(network.users(tensor)):
        tensor.name = unique_name(f"{tensor.name}_float32", {t.name for t in network.tensors()})
    else:
        network.operators.remove(last)
    return result


def _stored_as(stored: Tensor, name: str, dtype: IoDtype) -> Tensor:
    """A tensor of ``dtype`` that stands for the same numbers as an int8 one."""
    assert stored.quantization is not None
    shift = UNSIGNED if dtype == "uint8" else 0
    zero = stored.quantization.zero_point + np.int64(shift)
    quantization = Quantization(stored.quantization.scale, zero)
    return dataclasses.replace(stored, name=name, dtype=dtype, quantization=quantization)


def _replace(network: Network, old: Tensor, new: Tensor) -> None:
    for operator in network.operators:
        operator.inputs = [new if t is old else t for t in operator.inputs]
        operator.outputs = [new if t is old else t for t in operator.outputs]
