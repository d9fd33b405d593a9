"""How each kind of operator runs in int8: one table. What is not in it runs in float32 between DEQUANTIZE and QUANTIZE.

Every entry was compared with its formula on both runtimes, with and without XNNPACK: tests/test_tflite_quantize.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lorac_exporters.tflite.network import Operator, Quantization, Tensor

LEVELS = 255  # steps between the smallest and the largest int8 number
LOW, HIGH = -128, 127
HUGE = 1e30  # a padding value beyond it means minus infinity, not a number to be kept


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Inputs of an operator with weights, and the stored axis of its output channels; None: one scale per tensor."""

    data: int
    weight: int
    bias: int
    axis: int | None


# FULLY_CONNECTED has one scale per tensor: 2.14.0 knows no scales per channel there, and a version that makes it
# refuse them would shut it out from every classifier.
WEIGHTED = {
    "CONV_2D": Weighted(0, 1, 2, 0),
    "DEPTHWISE_CONV_2D": Weighted(0, 1, 2, 3),
    "FULLY_CONNECTED": Weighted(0, 1, 2, None),
}

# Operators that move or choose stored numbers: all their activations have one scale.
SAME_SCALE = frozenset(
    {
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "DEPTH_TO_SPACE",
        "GATHER",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MINIMUM",
        "MIRROR_PAD",
        "PAD",
        "PADV2",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "SLICE",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "STRIDED_SLICE",
        "TRANSPOSE",
    }
)

# Operators whose kernels take the scale of their output for granted.
FIXED = {
    "LOGISTIC": (1 / 256, -128),
    "SOFTMAX": (1 / 256, -128),
    "LOG_SOFTMAX": (16 / 256, 127),
    "TANH": (1 / 128, 0),
    "L2_NORMALIZATION": (1 / 128, 0),
}

# Operators with a scale of its own for each activation. Not SUM: reference kernels of 2.14.0 answer wrongly.
FREE = frozenset(
    {
        "ADD",
        "ELU",
        "GELU",
        "HARD_SWISH",
        "LEAKY_RELU",
        "MEAN",
        "MUL",
        "PRELU",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "SUB",
    }
)

# Cheap operators that stay in float32 where all that they read was computed in float32.
LIGHT = frozenset({"ADD", "MUL", "SUB", "MEAN", "RELU", "RELU6", "RESHAPE", "TRANSPOSE"})


def activations(operator: Operator) -> list[Tensor]:
    """The float32 tensors that an operator reads and that are not constants."""
    return [t for t in operator.inputs if t is not None and t.dtype == "float32" and t.data is None]


def has_int8_kernel(operator: Operator) -> bool:
    """Whether both runtimes compute an operator in int8, and rightly."""
    if not activations(operator) or any(out.dtype != "float32" for out in operator.outputs):
        return False
    if operator.kind in WEIGHTED:
        return _has_constant_weights(operator)
    return operator.kind in SAME_SCALE or operator.kind in FIXED or operator.kind in FREE


def _has_constant_weights(operator: Operator) -> bool:
    rule = WEIGHTED[operator.kind]
    weight = operator.inputs[rule.weight]
    bias = operator.inputs[rule.bias] if rule.bias < len(operator.inputs) else None
    return weight is not None and weight.data is not None and (bias is None or bias.data is not None)


def parameters(low: float, high: float) -> Quantization:
    """Scale and zero point for activations between ``low`` and ``high``; zero is always among the stored numbers.

    >>> found = parameters(-1.0, 1.55)
    >>> found.scale, found.zero_point
    (array([0.01], dtype=float32), array([-28]))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / LEVELS) if high > low else np.float32(1)
    scale = max(scale, np.finfo(np.float32).tiny)
    zero = int(np.clip(np.rint(LOW - low / float(scale)), LOW, HIGH))
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64))
