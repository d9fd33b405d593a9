"""The options tables of TFLite's operators: which table an operator has, and the type of each of its fields.

Facts of the schema (version 3, as of TensorFlow 2.18), held as tables so that writing and reading are one loop each.
Enumerations stand in `Operator.options` by name: ``padding="SAME"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tflite

from lorac_exporters.tflite.network import Option

# Options table -> its fields as name:type in the order of the schema; "ints" is a vector of int32, a type with a
# capital letter an enumeration. Tables that are not here have no fields.
_FIELDS = {
    "AddOptions": "fused_activation_function:ActivationFunctionType pot_scale_int16:bool",
    "ArgMaxOptions": "output_type:TensorType",
    "ArgMinOptions": "output_type:TensorType",
    "BatchMatMulOptions": "adj_x:bool adj_y:bool asymmetric_quantize_inputs:bool",
    "CastOptions": "in_data_type:TensorType out_data_type:TensorType",
    "ConcatenationOptions": "axis:int fused_activation_function:ActivationFunctionType",
    "Conv2DOptions": "padding:Padding stride_w:int stride_h:int fused_activation_function:ActivationFunctionType"
    " dilation_w_factor:int dilation_h_factor:int quantized_bias_type:TensorType",
    "CumsumOptions": "exclusive:bool reverse:bool",
    "DepthToSpaceOptions": "block_size:int",
    "DepthwiseConv2DOptions": "padding:Padding stride_w:int stride_h:int depth_multiplier:int"
    " fused_activation_function:ActivationFunctionType dilation_w_factor:int dilation_h_factor:int",
    "DivOptions": "fused_activation_function:ActivationFunctionType",
    "FullyConnectedOptions": "fused_activation_function:ActivationFunctionType"
    " weights_format:FullyConnectedOptionsWeightsFormat keep_num_dims:bool asymmetric_quantize_inputs:bool"
    " quantized_bias_type:TensorType",
    "GatherOptions": "axis:int batch_dims:int",
    "GeluOptions": "approximate:bool",
    "L2NormOptions": "fused_activation_function:ActivationFunctionType",
    "LeakyReluOptions": "alpha:float",
    "LocalResponseNormalizationOptions": "radius:int bias:float alpha:float beta:float",
    "MirrorPadOptions": "mode:MirrorPadMode",
    "MulOptions": "fused_activation_function:ActivationFunctionType",
    "OneHotOptions": "axis:int",
    "PackOptions": "values_count:int axis:int",
    "Pool2DOptions": "padding:Padding stride_w:int stride_h:int filter_width:int filter_height:int"
    " fused_activation_function:ActivationFunctionType",
    "ReducerOptions": "keep_dims:bool",
    "ReshapeOptions": "new_shape:ints",
    "ResizeBilinearOptions": "align_corners:bool half_pixel_centers:bool",
    "ResizeNearestNeighborOptions": "align_corners:bool half_pixel_centers:bool",
    "ShapeOptions": "out_type:TensorType",
    "SoftmaxOptions": "beta:float",
    "SpaceToDepthOptions": "block_size:int",
    "SplitOptions": "num_splits:int",
    "SplitVOptions": "num_splits:int",
    "SqueezeOptions": "squeeze_dims:ints",
    "StridedSliceOptions": "begin_mask:int end_mask:int ellipsis_mask:int new_axis_mask:int shrink_axis_mask:int"
    " offset:bool",
    "SubOptions": "fused_activation_function:ActivationFunctionType pot_scale_int16:bool",
    "TransposeConvOptions": "padding:Padding stride_w:int stride_h:int"
    " fused_activation_function:ActivationFunctionType quantized_bias_type:TensorType",
    "UnpackOptions": "num:int axis:int",
}

_NOT_ZERO: dict[str, Option] = {"dilation_w_factor": 1, "dilation_h_factor": 1, "pot_scale_int16": True}
_IDLE: dict[str, Option] = {"int": 0, "bool": False, "float": 0.0, "ints": ()}

# Operators that share a table, or whose table is not simply called after them.
_TABLES = {
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "L2_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "L2_NORMALIZATION": "L2NormOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "PADV2": "PadV2Options",
    "BATCH_TO_SPACE_ND": "BatchToSpaceNDOptions",
    "SPACE_TO_BATCH_ND": "SpaceToBatchNDOptions",
}
_CALLED_AFTER = (
    "ABS ADD ADD_N ARG_MAX ARG_MIN BROADCAST_TO CAST CONCATENATION CONV_2D COS CUMSUM DEPTHWISE_CONV_2D"
    " DEPTH_TO_SPACE DEQUANTIZE DIV EQUAL EXP EXPAND_DIMS FILL FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND"
    " GELU GREATER GREATER_EQUAL HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOCAL_RESPONSE_NORMALIZATION LOGICAL_AND"
    " LOGICAL_NOT LOGICAL_OR LOG_SOFTMAX MIRROR_PAD MUL NEG NOT_EQUAL ONE_HOT PACK PAD POW QUANTIZE RANGE RANK RESHAPE"
    " RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 SELECT SELECT_V2 SHAPE SIGN SLICE SOFTMAX"
    " SPACE_TO_DEPTH SPLIT SPLIT_V SQUARE SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB TILE TRANSPOSE TRANSPOSE_CONV"
    " UNPACK WHERE ZEROS_LIKE"
)
_WITHOUT = "CEIL ELU FLOOR LOG LOGISTIC PRELU RELU RELU_0_TO_1 RELU_N1_TO_1 RELU6 ROUND RSQRT SIN SQRT TANH"


def camel(name: str) -> str:
    """How the generated code spells a name of the schema.

    >>> camel("stride_w"), camel("DEPTHWISE_CONV_2D"), camel("pot_scale_int16")
    ('StrideW', 'DepthwiseConv2D', 'PotScaleInt16')
    """
    return "".join(part[:1].upper() + part[1:].lower() for part in name.lower().split("_")).replace("2d", "2D")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of an options table; ``kind`` is int, bool, float, ints, or the name of an enumeration."""

    name: str
    kind: str

    @property
    def idle(self) -> Option:
        """The value of a field that is absent from a file."""
        if self.kind[0].isupper():
            return enum_name(self.kind, 0)
        if self.name in _NOT_ZERO:
            return _NOT_ZERO[self.name]
        return _IDLE[self.kind]

    def stored(self, value: Option) -> Any:
        """``value`` as the file holds it. Raises ValueError if it is of another type or no name of the enumeration."""
        if self.kind[0].isupper():
            return enum_value(self.kind, value)
        if self.kind == "ints":
            good = isinstance(value, tuple) and all(type(item) is int for item in value)
        else:
            good = type(value).__name__ == self.kind or (self.kind == "float" and type(value) is int)
        if not good:
            raise ValueError(f"option {self.name} is {value!r}, expected {self.kind}")
        return value


@dataclasses.dataclass(frozen=True)
class OptionsTable:
    """The options of one operator; ``name`` is None where the schema has none."""

    name: str | None
    fields: tuple[Field, ...] = ()

    @property
    def union_type(self) -> int:
        """The number of this table in the union BuiltinOptions."""
        number: int = getattr(tflite.BuiltinOptions, self.name or "NONE")
        return number

    def stored(self, options: Mapping[str, Option]) -> dict[Field, Any]:
        """Each option given, as the file holds it, in the order of the schema.

        Raises ValueError for an option that the table lacks or a value that does not fit.
        """
        unknown = sorted(set(options) - {field.name for field in self.fields})
        if unknown:
            known = ", ".join(field.name for field in self.fields) or "none"
            raise ValueError(f"unknown options {', '.join(unknown)}; {self.name or 'this operator'} has {known}")
        return {field: field.stored(options[field.name]) for field in self.fields if field.name in options}


def options_table(kind: str) -> OptionsTable:
    """The options table of an operator. Raises ValueError if the operator is not among those known here.

    >>> [field.name for field in options_table("SOFTMAX").fields]
    ['beta']
    """
    if kind not in KINDS:
        raise ValueError(f"operator {kind} is unknown to this reader and writer of TFLite files")
    return KINDS[kind]


def enum_value(enum: str, name: Option) -> int:
    """The number of an enumeration's name. Raises ValueError if it has no such name.

    >>> enum_value("Padding", "VALID")
    1
    """
    names = enum_names(enum)
    if name not in names:
        raise ValueError(f"{name!r} is no {enum}; expected one of {', '.join(names)}")
    return names[str(name)]


def enum_name(enum: str, number: int) -> str:
    """The name of an enumeration's number. Raises ValueError if it has no such number.

    >>> enum_name("ActivationFunctionType", 3)
    'RELU6'
    """
    for name, value in enum_names(enum).items():
        if value == number:
            return name
    raise ValueError(f"{number} is no {enum}")


def enum_names(enum: str) -> dict[str, int]:
    """Name -> number of an enumeration of the schema."""
    return {name: value for name, value in vars(getattr(tflite, enum)).items() if isinstance(value, int)}


def _table(name: str) -> OptionsTable:
    entries = (entry.split(":") for entry in _FIELDS.get(name, "").split())
    return OptionsTable(name, tuple(Field(*entry) for entry in entries))


KINDS = {
    **{kind: _table(name) for kind, name in _TABLES.items()},
    **{kind: _table(f"{camel(kind)}Options") for kind in _CALLED_AFTER.split()},
    **{kind: OptionsTable(None) for kind in _WITHOUT.split()},
}
