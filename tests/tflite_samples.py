"""Small TFLite networks for the tests of the schema, its versions and the metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.schema_options import KINDS, Field, enum_names

METADATA = {"min_runtime_version": b"1.5.0".ljust(16, b"\0"), "other": bytes(range(7))}
FILES = {"labels.txt": b"cat\ndog\n", "more/notes.txt": "gr\u00fcn".encode()}


def network_of(*operators: Operator, **more: Any) -> Network:
    """A network: its inputs are what the first operator reads and no constant, its outputs what the last one makes."""
    inputs = [t for t in operators[0].inputs if t is not None and t.data is None]
    outputs = operators[-1].outputs
    keys = tuple(f"{t.name}_key" for t in inputs), tuple(f"{t.name}_key" for t in outputs)
    return Network(list(operators), inputs, list(outputs), *keys, **more)


def convolution(*, stride: tuple[int, int] = (1, 1), **more: Any) -> Network:
    """One float32 convolution 3x3 from 3 to 5 channels with RELU, images 7 x 8, padding SAME."""
    rng = np.random.default_rng(7)
    size = (-(-7 // stride[0]), -(-8 // stride[1]))
    image = Tensor("image", (1, 7, 8, 3), batch_axis=0)
    weight = Tensor("conv.weight", (5, 3, 3, 3), data=rng.normal(size=(5, 3, 3, 3)).astype(np.float32))
    bias = Tensor("conv.bias", (5,), data=rng.normal(size=5).astype(np.float32))
    scores = Tensor("scores", (1, *size, 5), batch_axis=0)
    options: dict[str, Any] = {"padding": "SAME", "stride_h": stride[0], "stride_w": stride[1]}
    options["fused_activation_function"] = "RELU"
    return network_of(Operator("CONV_2D", [image, weight, bias], [scores], options), **more)


FULL = convolution(description="a test", metadata=METADATA, files=FILES)


def int8_convolution(channels: int = 4) -> Network:
    """One int8 convolution with a scale for each output channel."""
    image = Tensor("image", (1, 6, 6, 2), "int8", batch_axis=0, quantization=one_scale(0.5, -3))
    scales = np.linspace(0.01, 0.04, channels, dtype=np.float32)
    zeros = np.zeros(channels, np.int64)
    weight = Tensor(
        "conv.weight",
        (channels, 3, 3, 2),
        "int8",
        data=np.arange(channels * 18, dtype=np.int8).reshape(channels, 3, 3, 2),
        quantization=Quantization(scales, zeros, 0),
    )
    bias = Tensor(
        "conv.bias",
        (channels,),
        "int32",
        data=np.arange(channels, dtype=np.int32) * 1000,
        quantization=Quantization(scales * np.float32(0.5), zeros, 0),
    )
    scores = Tensor("scores", (1, 6, 6, channels), "int8", batch_axis=0, quantization=one_scale(2.0, 5))
    options: dict[str, Any] = {"padding": "SAME", "stride_h": 1, "stride_w": 1}
    return network_of(Operator("CONV_2D", [image, weight, bias], [scores], options))


def one_scale(scale: float, zero_point: int) -> Quantization:
    """One scale for the whole tensor."""
    return Quantization(np.array([scale], np.float32), np.array([zero_point], np.int64))


def busy_options(kind: str) -> dict[str, Any]:
    """For each option of an operator a value that an absent field would not have; fields of one type differ."""
    return {field.name: _busy(field, i) for i, field in enumerate(KINDS[kind].fields)}


def _busy(field: Field, place: int) -> Any:
    if field.kind[0].isupper():
        names = list(enum_names(field.kind))
        return names[1 + place % (len(names) - 1)]
    if field.kind == "bool":
        return not field.idle
    return {"int": 3 + place, "float": 0.5 + place, "ints": (-1, 2, 7 + place)}[field.kind]
