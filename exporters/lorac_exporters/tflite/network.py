"""A TFLite network in memory: what the writer lowers an ONNX graph to, and what a .tflite file is read into.

Tensors are objects, and operators point to them; their order in the file is the order in which operators use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DType = Literal["float32", "float16", "int32", "int64", "int8", "uint8", "bool"]
Option = bool | int | float | str | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """``real = scale * (stored - zero_point)``; one pair, or one for each index along the stored ``axis``.

    ``scale``: float32 of shape (1,) or (channels,); ``zero_point``: int64 of the same shape.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """Which ONNX initializer a constant's numbers are, element for element.

    stored = initializer.reshape(view or its own shape).transpose(permute or as it is); only the order of the
    numbers differs, so a new value of the initializer can be written into the same bytes. The tensor's own shape may
    join neighbouring axes of that, or hold further axes of size 1.
    ``channel_axis`` is the axis of output channels in the initializer's own shape.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    channel_axis: int = 0


@dataclasses.dataclass(eq=False)
class Tensor:
    """One tensor: its shape as stored, and its numbers if it is a constant.

    ``batch_axis`` is the stored axis that holds the batch (size 1 in ``shape``, free in the file's signature).
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType = "float32"
    data: Array | None = None
    quantization: Quantization | None = None
    batch_axis: int | None = None
    source: Source | None = None

    @property
    def signature(self) -> tuple[int, ...]:
        """The shape with -1 for the batch.

        >>> Tensor("x", (1, 8, 8, 3), batch_axis=0).signature
        (-1, 8, 8, 3)
        """
        return tuple(-1 if axis == self.batch_axis else size for axis, size in enumerate(self.shape))


@dataclasses.dataclass(eq=False)
class Operator:
    """One operator: ``kind`` is its name in the schema's BuiltinOperator, ``options`` the fields of its own table.

    Fields that are enumerations hold the schema's name: ``padding="SAME"``, ``fused_activation_function="RELU"``.
    ``version`` 0 means: the lowest version that describes the operator as it is; `versions.settle` fills it in.
    """

    kind: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    options: dict[str, Option] = dataclasses.field(default_factory=dict)
    version: int = 0


@dataclasses.dataclass
class Network:
    """One sub-graph in topological order. ``metadata``: named buffers of the file.

    ``input_keys`` and ``output_keys`` are the names under the signature ``serving_default``. ``files`` are appended
    to the file as a zip archive, where apps look for labels (the convention of TFLite metadata).
    """

    operators: list[Operator]
    inputs: list[Tensor]
    outputs: list[Tensor]
    input_keys: tuple[str, ...]
    output_keys: tuple[str, ...]
    description: str = ""
    metadata: dict[str, bytes] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor once: inputs, then in the order of use, then outputs."""
        found = dict.fromkeys(self.inputs)
        for operator in self.operators:
            found |= dict.fromkeys(t for t in (*operator.inputs, *operator.outputs) if t is not None)
        return list(found | dict.fromkeys(self.outputs))

    def constants(self) -> list[Tensor]:
        """Tensors that hold numbers, in the order of `tensors`."""
        return [tensor for tensor in self.tensors() if tensor.data is not None]

    def users(self, tensor: Tensor) -> Iterator[tuple[Operator, int]]:
        """(operator, input index) of each use; being an output of the network is not among them."""
        for operator in self.operators:
            yield from ((operator, i) for i, used in enumerate(operator.inputs) if used is tensor)

    def producer(self, tensor: Tensor) -> Operator | None:
        """The operator that computes a tensor; None for inputs and constants."""
        return next((op for op in self.operators if any(out is tensor for out in op.outputs)), None)
