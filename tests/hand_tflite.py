"""Small TFLite networks, put together by hand and not by the writer's rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.schema import buffer_ranges, to_bytes
from lorac_runtime.manifest import ByteRange, Patch, Quantized

CLASSES = 4


def scales(*values: float, axis: int = 0) -> Quantization:
    return Quantization(np.array(values, np.float32), np.zeros(len(values), np.int64), axis)


def activation(scale: float, zero_point: int) -> Quantization:
    return Quantization(np.array([scale], np.float32), np.array([zero_point], np.int64))


def floats(seed: int = 0) -> Network:
    """A convolution, a mean over positions and a classifier, in float32."""
    rng = np.random.default_rng(seed)
    image = Tensor("input", (1, 6, 6, 3), batch_axis=0)
    weight, bias = constant("conv.weight", rng, (5, 3, 3, 3)), constant("conv.bias", rng, (5,))
    hidden = Tensor("hidden", (1, 4, 4, 5), batch_axis=0)
    pooled = Tensor("pooled", (1, 5), batch_axis=0)
    axes = Tensor("axes", (2,), "int32", data=np.array([1, 2], np.int32))
    head, head_bias = constant("fc.weight", rng, (CLASSES, 5)), constant("fc.bias", rng, (CLASSES,))
    logits = Tensor("logits", (1, CLASSES), batch_axis=0)
    options = {"padding": "VALID", "stride_w": 1, "stride_h": 1, "fused_activation_function": "RELU"}
    operators = [
        Operator("CONV_2D", [image, weight, bias], [hidden], options),
        Operator("MEAN", [hidden, axes], [pooled], {"keep_dims": False}),
        Operator("FULLY_CONNECTED", [pooled, head, head_bias], [logits], {"fused_activation_function": "NONE"}),
    ]
    network = Network(operators, [image], [logits], ("input",), ("logits",), "a network put together by hand")
    network.metadata["min_runtime_version"] = b"1.5.0"
    network.files["labels.txt"] = b"cat\ndog\ncow\nhen\n"
    return network


def integers(seed: int = 0) -> Network:
    """The convolution alone, in int8 with one scale per channel."""
    rng = np.random.default_rng(seed)
    image = Tensor("input", (1, 6, 6, 3), "int8", quantization=activation(0.02, -3), batch_axis=0)
    content = rng.integers(-127, 128, (5, 3, 3, 3)).astype(np.int8)
    weight = Tensor("conv.weight", content.shape, "int8", content, scales(*np.linspace(0.01, 0.02, 5)))
    offsets = rng.integers(-999, 999, 5).astype(np.int32)
    bias = Tensor("conv.bias", (5,), "int32", offsets, scales(*np.linspace(2e-4, 4e-4, 5)))
    output = Tensor("logits", (1, 4, 4, 5), "int8", quantization=activation(0.1, 5), batch_axis=0)
    options = {"padding": "VALID", "stride_w": 1, "stride_h": 1, "fused_activation_function": "NONE"}
    conv = Operator("CONV_2D", [image, weight, bias], [output], options)
    return Network([conv], [image], [output], ("input",), ("logits",))


def constant(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, shape, data=rng.standard_normal(shape).astype(np.float32))


def named(network: Network, name: str) -> Tensor:
    return next(tensor for tensor in network.tensors() if tensor.name == name)


def write(network: Network, path: Path) -> Path:
    path.write_bytes(to_bytes(network))
    return path


def patch(path: Path, name: str, *, quantized: bool = False) -> Patch:
    """The patch entry of a tensor, in the order of axes in which it is stored."""
    content = path.read_bytes()
    where = buffer_ranges(content)[name]
    partner = name.replace("weight", "b?").replace("bias", "weight").replace("b?", "bias")
    tensor = {1: "float32"} if not quantized else {}
    dtype = tensor.get(1) or ("int8" if name.endswith("weight") else "int32")
    shape = (where.data.nbytes // {"float32": 4, "int8": 1, "int32": 4}[dtype],)
    found = Patch(name, path.name, where.data.offset, where.data.nbytes, dtype, shape)
    if not quantized or where.scales is None:
        return found
    places = ByteRange(where.scales.offset, where.scales.nbytes)
    return dataclasses.replace(found, quantization=Quantized(0, places, partner, 0.02))
