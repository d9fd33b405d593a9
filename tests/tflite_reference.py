"""What a TFLite network should compute, by PyTorch and numpy: each operator on real numbers, then rounded as stored.

An int8 operator is simulated as it is meant: real numbers from the stored ones, the operator's formula in float64, and
the nearest stored number of its output. Kernels may differ by a step where they round in the middle.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor

Array = np.ndarray
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}


def evaluate(network: Network, x: Array) -> dict[str, Array]:
    """Real numbers (float64) of every activation by name, for the input ``x`` as the file takes it."""
    given = network.inputs[0]
    real: dict[Tensor, Array] = {given: dequantized(np.asarray(x), given.quantization)}
    for operator in network.operators:
        inputs = [None if t is None else _real(t, real) for t in operator.inputs]
        results = activated(operator, KINDS[operator.kind](operator, inputs))
        for tensor, result in zip(operator.outputs, results, strict=True):
            real[tensor] = rounded(result, tensor)
    return {tensor.name: array for tensor, array in real.items()}


def float_ranges(network: Network, x: Array) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of each activation."""
    return {name: (float(array.min()), float(array.max())) for name, array in evaluate(network, x).items()}


def steps_apart(network: Network, found: Array, expected: Array, output: int = 0) -> float:
    """Largest difference in steps of the stored output."""
    producer = network.producer(network.outputs[output])
    assert producer is not None
    stored = producer.inputs[0] if producer.kind == "DEQUANTIZE" else network.outputs[output]
    assert stored is not None
    assert stored.quantization is not None
    return float(np.max(np.abs(found - expected))) / float(stored.quantization.scale[0])


def dequantized(stored: Array, quantization: Quantization | None) -> Array:
    """``scale * (stored - zero_point)``."""
    if quantization is None:
        return stored.astype(np.float64) if stored.dtype.kind == "f" else stored
    shape = [-1 if i == quantization.axis else 1 for i in range(stored.ndim)]
    scale, zero = quantization.scale.astype(np.float64), quantization.zero_point
    if scale.size > 1:
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (stored.astype(np.float64) - zero) * scale


def rounded(real: Array, tensor: Tensor) -> Array:
    """The numbers that a tensor really holds when it is given ``real``."""
    if tensor.quantization is None:
        return real
    low, high = LIMITS[tensor.dtype]
    scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zero_point[0])
    return (np.clip(np.rint(real / scale) + zero, low, high) - zero) * scale


def activated(operator: Operator, results: list[Array]) -> list[Array]:
    """Fused activations."""
    kind = operator.options.get("fused_activation_function", "NONE")
    return [ACTIVATIONS[str(kind)](result) for result in results]


def _real(tensor: Tensor, real: dict[Tensor, Array]) -> Array:
    return real[tensor] if tensor.data is None else dequantized(tensor.data, tensor.quantization)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "NONE": lambda x: x,
    "RELU": lambda x: np.maximum(x, 0),
    "RELU6": lambda x: np.clip(x, 0, 6),
    "RELU_N1_TO_1": lambda x: np.clip(x, -1, 1),
}


def _torch(x: Array) -> torch.Tensor:
    """(N, H, W, C) to (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def _numpy(x: torch.Tensor) -> Array:
    return np.moveaxis(x.numpy(), 1, -1)


def _int(operator: Operator, field: str, default: int = 1) -> int:
    value = operator.options.get(field, default)
    assert isinstance(value, int)
    return value


def _pads(operator: Operator, sizes: tuple[int, int], kernel: tuple[int, int]) -> list[int]:
    """torch's (left, right, top, bottom) of SAME or VALID."""
    if operator.options["padding"] == "VALID":
        return [0, 0, 0, 0]
    pads: list[int] = []
    for size, k, letter in zip(sizes, kernel, "hw", strict=True):
        stride, dilation = _int(operator, f"stride_{letter}"), _int(operator, f"dilation_{letter}_factor")
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return pads


def _convolution(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    assert x is not None
    assert weight is not None
    if operator.kind == "DEPTHWISE_CONV_2D":
        kernel, groups = torch.from_numpy(weight.transpose(3, 0, 1, 2).copy()), x.shape[-1]
    else:
        kernel, groups = torch.from_numpy(weight.transpose(0, 3, 1, 2).copy()), x.shape[-1] // weight.shape[-1]
    padded = functional.pad(_torch(x), _pads(operator, x.shape[1:3], kernel.shape[2:]))
    stride = (_int(operator, "stride_h"), _int(operator, "stride_w"))
    dilation = (_int(operator, "dilation_h_factor"), _int(operator, "dilation_w_factor"))
    shift = None if bias is None else torch.from_numpy(np.asarray(bias, np.float64))
    return [_numpy(functional.conv2d(padded, kernel, shift, stride, 0, dilation, groups))]


def _linear(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    assert x is not None
    assert weight is not None
    rows = x if operator.options.get("keep_num_dims") else x.reshape(-1, weight.shape[1])
    return [rows @ weight.T + (0 if bias is None else bias)]


def _pool(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x = inputs[0]
    assert x is not None
    kernel = (_int(operator, "filter_height"), _int(operator, "filter_width"))
    stride = (_int(operator, "stride_h"), _int(operator, "stride_w"))
    pads = _pads(operator, x.shape[1:3], kernel)
    if operator.kind == "MAX_POOL_2D":
        return [_numpy(functional.max_pool2d(functional.pad(_torch(x), pads, value=-np.inf), kernel, stride))]
    total = functional.avg_pool2d(functional.pad(_torch(x), pads), kernel, stride, divisor_override=1)
    count = functional.avg_pool2d(functional.pad(torch.ones_like(_torch(x)), pads), kernel, stride, divisor_override=1)
    return [_numpy(total / count)]


def _resize(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x = inputs[0]
    assert x is not None
    sizes = operator.outputs[0].shape[1:3]
    if operator.kind == "RESIZE_NEAREST_NEIGHBOR":
        return [_numpy(functional.interpolate(_torch(x), sizes, mode="nearest"))]
    corners = bool(operator.options.get("align_corners"))
    assert corners or operator.options.get("half_pixel_centers"), "the asymmetric form has no torch counterpart"
    return [_numpy(functional.interpolate(_torch(x), sizes, mode="bilinear", align_corners=corners))]


def _depth_to_space(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    assert inputs[0] is not None
    n, h, w, c = inputs[0].shape
    b = _int(operator, "block_size")
    if operator.kind == "DEPTH_TO_SPACE":
        parts = inputs[0].reshape(n, h, w, b, b, c // b**2).transpose(0, 1, 3, 2, 4, 5)
        return [parts.reshape(n, h * b, w * b, c // b**2)]
    parts = inputs[0].reshape(n, h // b, b, w // b, b, c).transpose(0, 1, 3, 2, 4, 5)
    return [parts.reshape(n, h // b, w // b, c * b**2)]


def _reduction(function: Callable[..., Array]) -> Callable[[Operator, list[Array | None]], list[Array]]:
    def reduce(operator: Operator, inputs: list[Array | None]) -> list[Array]:
        x, axes = inputs
        assert axes is not None
        keep = bool(operator.options.get("keep_dims", False))
        return [function(x, axis=tuple(int(a) for a in axes), keepdims=keep)]

    return reduce


def _by_torch(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[Operator, list[Array | None]], list[Array]]:
    return lambda _, inputs: [function(torch.from_numpy(np.ascontiguousarray(inputs[0]))).numpy()]


def _elementwise(function: Callable[..., Array]) -> Callable[[Operator, list[Array | None]], list[Array]]:
    return lambda _, inputs: [function(*inputs)]


def _sliced(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x, begin, size = inputs
    assert x is not None
    assert begin is not None
    assert size is not None
    ends = [n if s == -1 else b + s for n, b, s in zip(x.shape, begin, size, strict=True)]
    return [x[tuple(slice(int(b), int(e)) for b, e in zip(begin, ends, strict=True))]]


def _strided(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x, begin, end, strides = inputs
    assert x is not None
    assert begin is not None
    assert end is not None
    assert strides is not None
    masks = [_int(operator, name, 0) for name in ("begin_mask", "end_mask")]
    cuts = [
        slice(None if masks[0] >> i & 1 else int(b), None if masks[1] >> i & 1 else int(e), int(s))
        for i, (b, e, s) in enumerate(zip(begin, end, strides, strict=True))
    ]
    return [x[tuple(cuts)]]


def _padded(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    x, pads = inputs[0], inputs[1]
    assert x is not None
    if operator.kind == "MIRROR_PAD":
        return [np.pad(x, pads, mode="reflect")]
    value = float(np.ravel(inputs[2])[0]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    return [np.pad(x, pads, constant_values=value)]


def _reshaped(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    assert inputs[0] is not None
    return [inputs[0].reshape(len(inputs[0]), *operator.outputs[0].shape[1:])]


def _split(operator: Operator, inputs: list[Array | None]) -> list[Array]:
    axis, x = inputs if operator.kind == "SPLIT" else (inputs[2], inputs[0])
    assert axis is not None
    place = int(np.ravel(axis)[0])
    bounds = np.cumsum([tensor.shape[place] for tensor in operator.outputs])[:-1]
    return np.split(x, bounds, axis=place)


KINDS: dict[str, Callable[[Operator, list[Array | None]], list[Array]]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "FULLY_CONNECTED": _linear,
    "MAX_POOL_2D": _pool,
    "AVERAGE_POOL_2D": _pool,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "DEPTH_TO_SPACE": _depth_to_space,
    "SPACE_TO_DEPTH": _depth_to_space,
    "MEAN": _reduction(np.mean),
    "SUM": _reduction(np.sum),
    "REDUCE_MAX": _reduction(np.max),
    "REDUCE_MIN": _reduction(np.min),
    "ADD": _elementwise(np.add),
    "SUB": _elementwise(np.subtract),
    "MUL": _elementwise(np.multiply),
    "DIV": _elementwise(np.divide),
    "MAXIMUM": _elementwise(np.maximum),
    "MINIMUM": _elementwise(np.minimum),
    "PRELU": _elementwise(lambda x, a: np.where(x < 0, x * a, x)),
    "RELU": _elementwise(ACTIVATIONS["RELU"]),
    "RELU6": _elementwise(ACTIVATIONS["RELU6"]),
    "RELU_N1_TO_1": _elementwise(ACTIVATIONS["RELU_N1_TO_1"]),
    "LEAKY_RELU": lambda op, inputs: [np.where(inputs[0] < 0, inputs[0] * op.options["alpha"], inputs[0])],
    "ELU": _by_torch(functional.elu),
    "GELU": lambda op, inputs: [functional.gelu(torch.from_numpy(inputs[0])).numpy()],
    "HARD_SWISH": _by_torch(functional.hardswish),
    "LOGISTIC": _by_torch(torch.sigmoid),
    "TANH": _by_torch(torch.tanh),
    "EXP": _by_torch(torch.exp),
    "ABS": _by_torch(torch.abs),
    "SQRT": _by_torch(torch.sqrt),
    "RSQRT": _by_torch(torch.rsqrt),
    "SOFTMAX": _by_torch(lambda x: torch.softmax(x, -1)),
    "LOG_SOFTMAX": _by_torch(lambda x: torch.log_softmax(x, -1)),
    "L2_NORMALIZATION": _by_torch(lambda x: functional.normalize(x, dim=-1, eps=1e-6)),
    "CONCATENATION": lambda op, inputs: [np.concatenate(inputs, axis=_int(op, "axis"))],
    "SPLIT": _split,
    "SPLIT_V": _split,
    "SLICE": _sliced,
    "STRIDED_SLICE": _strided,
    "PAD": _padded,
    "PADV2": _padded,
    "MIRROR_PAD": _padded,
    "RESHAPE": _reshaped,
    "SQUEEZE": _reshaped,
    "EXPAND_DIMS": _reshaped,
    "TRANSPOSE": lambda op, inputs: [np.transpose(inputs[0], inputs[1])],
    "GATHER": lambda op, inputs: [np.take(inputs[0], inputs[1], axis=_int(op, "axis"))],
    "QUANTIZE": lambda op, inputs: inputs,
    "DEQUANTIZE": lambda op, inputs: inputs,
    "CAST": _elementwise(lambda x: x.astype(np.float64)),
}
