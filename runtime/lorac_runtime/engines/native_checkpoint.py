"""The optimizer's memory inside a native checkpoint of onnxruntime-training 1.19, which its Python API does not show.

The file is a flatbuffer. Its tables, with their fields in order, are those of microsoft/onnxruntime at v1.19.2,
onnxruntime/core/flatbuffers/schema/ort_training_checkpoint.fbs and ort.fbs::

    Checkpoint { version; module_state; optimizer_groups:[OptimizerGroup]; property_bag }      identifier ODTC
    OptimizerGroup { group_name; step:int64; initial_learning_rate; optimizer_states:[ParameterOptimizerState] }
    ParameterOptimizerState { param_name:string; momentums:[Tensor] }
    Tensor { name:string; doc_string; dims:[int64]; data_type:int32; raw_data:[uint8]; ... }

Every position is checked against the length of the file before it is used.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import CheckpointError

Floats = npt.NDArray[np.float32]

IDENTIFIER = b"ODTC"
FLOAT = 1  # TensorDataType
OPTIMIZER_GROUPS = 2  # index of the field in its table; so below
STEP, OPTIMIZER_STATES = 1, 3
PARAM_NAME, MOMENTUMS = 0, 1
TENSOR_NAME, DIMS, DATA_TYPE, RAW_DATA = 0, 2, 3, 4


class NativeCheckpoint:
    """``moments``: tensor name -> moment's name ("momentum0", ...) -> its values, a view into ``content``.

    ``steps`` is a view of the number of steps taken, (1,), or None where the file leaves it out because it is 0.
    Writing to a view changes ``content``. Raises CheckpointError if the content is no such file.
    """

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.moments: dict[str, dict[str, Floats]] = {}
        self.steps: npt.NDArray[np.int64] | None = None
        try:
            self._read()
        except (struct.error, ValueError) as err:
            raise CheckpointError(f"not a checkpoint of onnxruntime-training 1.19: {err}") from err

    def _read(self) -> None:
        if self.content[4:8] != IDENTIFIER:
            raise ValueError(f"it starts with {bytes(self.content[:8])!r}, expected {IDENTIFIER!r} at byte 4")
        groups = self._tables(self._field(self._target(0), OPTIMIZER_GROUPS))
        if len(groups) != 1:
            raise ValueError(f"it has {len(groups)} groups of parameters in its optimizer, expected 1")
        if (place := self._field(groups[0], STEP)) is not None:
            self.steps = np.frombuffer(self.content, "<i8", 1, self._inside(place, 8))
        for state in self._tables(self._field(groups[0], OPTIMIZER_STATES)):
            tensors = self._tables(self._field(state, MOMENTUMS))
            self.moments[self._text(state, PARAM_NAME)] = {self._text(t, TENSOR_NAME): self._tensor(t) for t in tensors}

    def _tensor(self, table: int) -> Floats:
        kind = self._field(table, DATA_TYPE)
        if kind is None or self._number("<i", kind) != FLOAT:
            raise ValueError(f"{self._text(table, TENSOR_NAME)} is not float32")
        start, count = self._vector(self._field(table, DIMS), 8)
        shape = [self._number("<q", start + 8 * i) for i in range(count)]
        start, nbytes = self._vector(self._field(table, RAW_DATA), 1)
        if min(shape, default=1) < 0 or nbytes != 4 * math.prod(shape):
            raise ValueError(f"{nbytes} bytes do not hold shape {shape}")
        return np.frombuffer(self.content, "<f4", nbytes // 4, start).reshape(shape)

    def _field(self, table: int, index: int) -> int | None:
        """Where a field of a table lies; None where it has its default, as a field that is not stored."""
        vtable = table - self._number("<i", table)
        if 4 + 2 * index >= self._number("<H", vtable):
            return None
        offset = self._number("<H", vtable + 4 + 2 * index)
        return table + offset if offset else None

    def _tables(self, field: int | None) -> list[int]:
        start, count = self._vector(field, 4)
        return [self._target(start + 4 * i) for i in range(count)]

    def _text(self, table: int, index: int) -> str:
        start, nbytes = self._vector(self._field(table, index), 1)
        return self.content[start : start + nbytes].decode()

    def _vector(self, field: int | None, size: int) -> tuple[int, int]:
        """(position of the first element, number of elements) of a vector of elements of ``size`` bytes."""
        if field is None:
            return 0, 0
        start = self._target(field)
        count = self._number("<I", start)
        return self._inside(start + 4, count * size), count

    def _target(self, place: int) -> int:
        return place + int(self._number("<I", place))

    def _number(self, form: str, place: int) -> Any:
        return struct.unpack_from(form, self.content, self._inside(place, struct.calcsize(form)))[0]

    def _inside(self, place: int, nbytes: int) -> int:
        if place < 0 or place + nbytes > len(self.content):
            raise ValueError(f"it points to bytes {place}..{place + nbytes} of {len(self.content)}")
        return place
