"""How a .tflite file stores the network: types of weights, of the input and of the output."""

from __future__ import annotations

import dataclasses
from typing import Literal

Weights = Literal["float32", "fp16", "int8"]
IoDtype = Literal["float32", "uint8", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "fp16", "int8")
IO_DTYPES: tuple[IoDtype, ...] = ("float32", "uint8", "int8")


@dataclasses.dataclass(frozen=True)
class TfliteConfig:
    """How a .tflite file stores the network.

    ``weights``: ``float32``, ``fp16`` (half the size, computed in float32) or ``int8`` (a quarter, computed in
    integers; needs calibration). ``input_dtype``: ``uint8`` takes raw images and normalises them inside, ``int8``
    takes quantized ones; None is what the graph takes, float32 or raw uint8. ``output_dtype`` other than float32 gives
    quantized logits. Quantized inputs and outputs go with int8 weights.

    Raises ValueError for a value out of range, or for values that do not go together.
    """

    weights: Weights = "float32"
    input_dtype: IoDtype | None = None
    output_dtype: IoDtype | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights {self.weights!r} are not one of {', '.join(WEIGHTS)}")
        for name, value in (("input_dtype", self.input_dtype), ("output_dtype", self.output_dtype)):
            if value is not None and value not in IO_DTYPES:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(IO_DTYPES)}")
        quantized = self.input_dtype == "int8" or self.output_dtype in ("int8", "uint8")
        if quantized and self.weights != "int8":
            raise ValueError(f"quantized inputs and outputs need weights int8, not {self.weights}")
