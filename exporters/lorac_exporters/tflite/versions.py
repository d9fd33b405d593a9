"""Which version of an operator a file must ask for, so that an old runtime refuses what it cannot compute.

The rules are TensorFlow's published ones (``op_version.cc`` and ``runtime_version.cc``), for the
operators and dtypes that this package writes. A version is the highest that any property asks for: the dtype of
the input, its number of axes, an option.
"""

from __future__ import annotations

from collections.abc import Callable

from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.releases import RELEASES


def lowest(operator: Operator) -> int:
    """The lowest version that describes an operator as it is; float32 mostly needs 1, int8 a later one.

    >>> x, y = Tensor("x", (1, 8)), Tensor("y", (1, 8))
    >>> lowest(Operator("RELU6", [x], [y]))
    1
    >>> lowest(Operator("RELU6", [Tensor("x", (1, 8), "int8")], [Tensor("y", (1, 8), "int8")]))
    2
    """
    kind = operator.kind
    by_dtype = _BY_DTYPE.get(kind, {}).get(_deciding(operator).dtype, 1)
    by_rank = max((v for rank, v in _ABOVE_RANK.get(kind, ()) if _rank(operator) > rank), default=1)
    options = _BY_OPTION.get(kind, ())
    by_option = max((v for name, idle, v in options if operator.options.get(name, idle) != idle), default=1)
    special = _SPECIAL[kind](operator) if kind in _SPECIAL else 1
    return max(by_dtype, by_rank, by_option, special)


def settle(network: Network) -> None:
    """Give every operator of version 0 the lowest version that describes it, in place."""
    for operator in network.operators:
        operator.version = operator.version or lowest(operator)


def min_runtime_version(network: Network) -> str:
    """The release of TensorFlow whose TFLite runtime is the first that has every operator in its version.

    >>> x, y = Tensor("x", (1, 8)), Tensor("y", (1, 8))
    >>> min_runtime_version(Network([Operator("GELU", [x], [y])], [x], [y], ("x",), ("y",)))
    '2.9.0'
    """
    releases = (_release(operator.kind, operator.version or lowest(operator)) for operator in network.operators)
    return max((release for release in releases if release), key=_order, default=_FIRST)


def _release(kind: str, version: int) -> str:
    """The release that brought a version of an operator; empty where it is not known."""
    releases = dict(enumerate(RELEASES.get(kind, "").split(), start=1))
    return releases.get(version, "").strip("-")


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def _deciding(operator: Operator) -> Tensor:
    """The tensor whose dtype decides: the first input, but where that is the axis, the positions or a shape."""
    if operator.kind == "L2_NORMALIZATION":
        return operator.outputs[0]
    place = {"SPLIT": 1, "TRANSPOSE_CONV": 1, "FILL": 1}.get(operator.kind, 0)
    tensor = operator.inputs[place] if len(operator.inputs) > place else None
    if tensor is None:
        raise ValueError(f"{operator.kind} lacks its input {place}")
    return tensor


def _rank(operator: Operator) -> int:
    """Axes of the largest input for the operators that broadcast, and only if they do; else of the first input."""
    if operator.kind not in _BROADCASTING:
        return len(_deciding(operator).shape)
    shapes = [tensor.shape for tensor in operator.inputs[:2] if tensor is not None]
    return max(map(len, shapes)) if len(set(shapes)) > 1 else 0


def _types(operator: Operator) -> tuple[str, str, str]:
    """Dtypes of the input, the weight and the output."""
    data, weight = (*operator.inputs, None, None)[:2]
    if data is None or weight is None:
        raise ValueError(f"{operator.kind} lacks its input or its weight")
    return data.dtype, weight.dtype, operator.outputs[0].dtype


def _per_channel(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.quantization is not None and tensor.quantization.scale.size > 1


_FIRST = "1.5.0"  # the first release of TFLite that counts versions
_HYBRID = ("float32", "int8", "float32")  # int8 weights, float32 activations
_ALL_INT8 = ("int8", "int8", "int8")


def _convolution(operator: Operator) -> int:
    types = _types(operator)
    data, weight = operator.inputs[:2]
    if data is not None and weight is not None and data.shape[3:] != weight.shape[3:]:
        return 6  # grouped
    if types == _HYBRID:
        return 5 if _per_channel(weight) else 2
    return 3 if types == _ALL_INT8 else 1


def _depthwise(operator: Operator) -> int:
    types = _types(operator)
    if types == _HYBRID:
        return 6 if _per_channel(operator.inputs[1]) else 4
    return 3 if types == _ALL_INT8 else 1


def _fully_connected(operator: Operator) -> int:
    types = _types(operator)
    if types == _HYBRID and _per_channel(operator.inputs[1]):
        return 12
    if len(operator.inputs) == 2:
        return 6  # an absent bias; one that is given as -1 is as old as the operator
    if types == _HYBRID:
        return 9 if operator.options.get("asymmetric_quantize_inputs", False) else 3
    return 4 if types == _ALL_INT8 else 1


def _transposed_convolution(operator: Operator) -> int:
    return 3 if len(operator.inputs) == 4 and operator.inputs[3] is not None else 1


def _multiplication(operator: Operator) -> int:
    """Version 3 where the product of the input scales is not below the output's."""
    tensors = (*operator.inputs, *operator.outputs)
    scales = [float(t.quantization.scale[0]) for t in tensors if t is not None and t.quantization is not None]
    return 3 if len(scales) == 3 and scales[0] * scales[1] / scales[2] >= 1 else 1


def _conversion(operator: Operator) -> int:
    types = {_deciding(operator).dtype, operator.outputs[0].dtype}
    return 5 if "float16" in types else 3 if "int8" in types else 1


def _dequantization(operator: Operator) -> int:
    data = _deciding(operator)
    return 5 if data.dtype == "int8" and _per_channel(data) else 1


def _quantization(operator: Operator) -> int:
    return 3 if _per_channel(operator.outputs[0]) else 1


_SPECIAL: dict[str, Callable[[Operator], int]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _fully_connected,
    "TRANSPOSE_CONV": _transposed_convolution,
    "MUL": _multiplication,
    "CAST": _conversion,
    "DEQUANTIZE": _dequantization,
    "QUANTIZE": _quantization,
}

# Version 2 is the one with int8.
_INT8_IS_2 = (
    "ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND CONCATENATION DEPTH_TO_SPACE DEQUANTIZE"
    " EQUAL EXP FLOOR_MOD GATHER GELU GREATER GREATER_EQUAL L2_NORMALIZATION LESS LESS_EQUAL LOG LOGISTIC LOG_SOFTMAX"
    " MAXIMUM MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NOT_EQUAL PACK PAD PADV2 REDUCE_MAX REDUCE_MIN REDUCE_PROD RELU"
    " RELU6 RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT"
    " SPLIT_V SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TRANSPOSE TRANSPOSE_CONV UNPACK"
)
_MORE_DTYPES = {
    "ABS": {"uint8": 2, "int32": 5},
    "ADD": {"int64": 4},
    "ARG_MAX": {"bool": 3},
    "ARG_MIN": {"bool": 3},
    "BROADCAST_TO": {**dict.fromkeys(("float32", "float16", "int32", "int64", "uint8", "bool"), 2), "int8": 3},
    "DEQUANTIZE": {"float16": 3},
    "FILL": {"bool": 2, "int8": 3, "float16": 4},
    "FLOOR_DIV": {"float32": 2, "int8": 3},
    "GATHER": {"bool": 3},
    "GATHER_ND": {"bool": 5},
    "GELU": {"uint8": 2},
    "MUL": {"int64": 5},
    "PAD": {"bool": 5},
    "PADV2": {"bool": 5},
    "RANGE": {"int64": 2},
    "RELU": {"uint8": 2},
    "REVERSE_V2": {"bool": 2, "int8": 3},
    "SIGN": {"int32": 2},
    "SPLIT": {"int32": 3},
    "STRIDED_SLICE": {"bool": 3},
    "SUB": {"int64": 4},
    "TILE": {"int8": 3},
    "TRANSPOSE": {"bool": 3},
    "UNPACK": {"uint8": 2, "bool": 3},
    "WHERE": dict.fromkeys(("float32", "int32", "int64", "int8", "uint8"), 2),
}
_BY_DTYPE = {
    kind: {**({"int8": 2} if kind in _INT8_IS_2.split() else {}), **_MORE_DTYPES.get(kind, {})}
    for kind in {*_INT8_IS_2.split(), *_MORE_DTYPES}
}
# (rank, version): more axes than that need this version.
_ABOVE_RANK = {
    "DIV": ((4, 2),),
    "MAXIMUM": ((4, 3),),
    "MINIMUM": ((4, 3),),
    "PAD": ((4, 4),),
    "PADV2": ((4, 4),),
    "BATCH_TO_SPACE_ND": ((4, 3),),
    "SPACE_TO_BATCH_ND": ((4, 3),),
    "SELECT": ((4, 3),),
    "SLICE": ((4, 5),),
    "STRIDED_SLICE": ((4, 4),),
    "SUB": ((4, 3),),
    "TRANSPOSE": ((4, 4), (5, 6), (6, 8)),
}
_BROADCASTING = {"DIV", "MAXIMUM", "MINIMUM", "SUB"}
# (option, its idle value, version): any other value needs this version.
_BY_OPTION: dict[str, tuple[tuple[str, object, int], ...]] = {
    "DEPTHWISE_CONV_2D": (("dilation_w_factor", 1, 2), ("dilation_h_factor", 1, 2)),
    "FULLY_CONNECTED": (("keep_num_dims", False, 5), ("weights_format", "DEFAULT", 2)),
    "GATHER": (("batch_dims", 0, 5),),
    "RESIZE_BILINEAR": (("half_pixel_centers", False, 3),),
    "RESIZE_NEAREST_NEIGHBOR": (("half_pixel_centers", False, 3), ("align_corners", False, 3)),
    "STRIDED_SLICE": (("offset", False, 8), ("ellipsis_mask", 0, 6), ("new_axis_mask", 0, 6)),
    "TRANSPOSE_CONV": (("fused_activation_function", "NONE", 4),),
}
