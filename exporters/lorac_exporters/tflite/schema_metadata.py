"""The few tables of TFLite's metadata that an image classifier needs, written and read by hand.

The schema is ``metadata_schema.fbs`` of TensorFlow Lite Support (file identifier M001, version 1.0.0 of the parser
suffices). The package that holds its generated code, `tflite-support`, is no longer released and brings pybind11 and
a sound library; these are its tables, field name -> slot.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

IDENTIFIER = b"M001"
PARSER_VERSION = "1.0.0"
_SLOTS = {
    "ModelMetadata": {"name": 0, "description": 1, "subgraph_metadata": 3, "min_parser_version": 7},
    "SubGraphMetadata": {"input_tensor_metadata": 2, "output_tensor_metadata": 3},
    "TensorMetadata": {"name": 0, "description": 1, "content": 3, "process_units": 4, "associated_files": 6},
    "Content": {"content_properties_type": 0, "content_properties": 1},
    "FeatureProperties": {},
    "ImageProperties": {"color_space": 0, "default_size": 1},
    "ImageSize": {"width": 0, "height": 1},
    "ProcessUnit": {"options_type": 0, "options": 1},
    "NormalizationOptions": {"mean": 0, "std": 1},
    "AssociatedFile": {"name": 0, "description": 1, "type": 2},
}
_LENGTHS = {"ModelMetadata": 8, "SubGraphMetadata": 10, "TensorMetadata": 7, "Content": 3, "AssociatedFile": 5}
_BYTES = {"color_space", "type"}  # enumerations of one byte, as are the types of unions
_UNION_TYPES = {"FeatureProperties": 1, "ImageProperties": 2, "NormalizationOptions": 1}
_UNIONS = {"content_properties", "options"}
COLOR_SPACES = {3: 1, 1: 2}  # channels -> RGB, GRAYSCALE; others are unknown, 0
AXIS_LABELS = 2  # of AssociatedFileType: a line for each index along an axis

# A table as Python holds it: its name and its fields; fields are text, numbers, tables or lists of them.
Fields = Mapping[str, Any]


def encoded(table: str, fields: Fields) -> bytes:
    """The bytes of a table and all that it holds, with the identifier of metadata.

    A nested table is a pair of its name and its fields; a list holds tables or floats.
    """
    builder = flatbuffers.Builder(1024)
    builder.Finish(_table(builder, table, fields), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _table(builder: flatbuffers.Builder, name: str, fields: Fields) -> int:
    """Write a table; what it points to comes first."""
    slots = _SLOTS[name]
    places = {field: _placed(builder, value) for field, value in fields.items() if not isinstance(value, int)}
    builder.StartObject(_LENGTHS.get(name, len(slots)))
    for field, value in fields.items():
        if field in places:
            builder.PrependUOffsetTRelativeSlot(slots[field], places[field], 0)
        elif field in _BYTES:
            builder.PrependInt8Slot(slots[field], value, 0)
        else:
            builder.PrependUint32Slot(slots[field], value, 0)
        if field in _UNIONS:
            builder.PrependUint8Slot(slots[f"{field}_type"], _UNION_TYPES[value[0]], 0)
    return int(builder.EndObject())


def _placed(builder: flatbuffers.Builder, value: str | tuple[str, Fields] | Sequence[Any]) -> int:
    """Write text, a table, a vector of floats or a vector of tables; returns where it lies."""
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, tuple):
        return _table(builder, *value)
    if value and isinstance(value[0], float):
        return int(builder.CreateNumpyVector(np.asarray(value, "<f4")))
    offsets = [_table(builder, *item) for item in value]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


class Found:
    """A table of metadata that was read; fields that are absent are empty or 0.

    Wrong offsets raise what Python raises: struct.error, IndexError, ValueError, TypeError.
    """

    def __init__(self, name: str, table: Table) -> None:
        self._slots, self._table = _SLOTS[name], table

    def text(self, field: str) -> str:
        place = self._place(field)
        return self._table.String(self._table.Pos + place).decode() if place else ""

    def byte(self, field: str) -> int:
        place = self._place(field)
        return int(self._table.Get(number_types.Uint8Flags, self._table.Pos + place)) if place else 0

    def number(self, field: str) -> int:
        place = self._place(field)
        return int(self._table.Get(number_types.Uint32Flags, self._table.Pos + place)) if place else 0

    def floats(self, field: str) -> tuple[float, ...]:
        place = self._place(field)
        return tuple(self._table.GetVectorAsNumpy(number_types.Float32Flags, place).tolist()) if place else ()

    def inner(self, name: str, field: str) -> Found | None:
        """A nested table; for a union, only if it holds the table ``name``."""
        place = self._place(field)
        if not place or (field in _UNIONS and self._union_type(field) != _UNION_TYPES[name]):
            return None
        return Found(name, Table(self._table.Bytes, self._table.Indirect(self._table.Pos + place)))

    def inners(self, name: str, field: str) -> list[Found]:
        """A vector of tables."""
        place = self._place(field)
        if not place:
            return []
        count, start = self._table.VectorLen(place), self._table.Vector(place)
        if start + 4 * count > len(self._table.Bytes):
            raise IndexError(f"{count} tables do not fit")
        indirect: Callable[[int], int] = self._table.Indirect
        return [Found(name, Table(self._table.Bytes, indirect(start + 4 * i))) for i in range(count)]

    def _union_type(self, field: str) -> int:
        return self.byte(f"{field}_type")

    def _place(self, field: str) -> int:
        return int(self._table.Offset(4 + 2 * self._slots[field]))


def root(content: bytes) -> Found:
    """The table ModelMetadata of encoded metadata. Raises ValueError if it has another identifier."""
    if content[4:8] != IDENTIFIER:
        raise ValueError(f"metadata has the identifier {content[4:8]!r}, expected {IDENTIFIER!r}")
    return Found("ModelMetadata", Table(memoryview(content), struct.unpack_from("<I", content)[0]))
