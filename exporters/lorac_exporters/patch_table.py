"""Where the numbers of each initializer lie in a saved ONNX file.

An ONNX file is a protobuf message. Its wire format (protobuf.dev, "Encoding") is a list of fields, each a key
(field number << 3 | wire type) and a payload; nested messages and raw bytes have wire type 2: a length, then so
many bytes. Walking it needs no ONNX library, and raw tensor data is skipped, not read.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import Patch

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, and those of TensorProto.
_GRAPH, _INITIALIZER = 7, 5
_DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA = 2, 8, 9, 13
_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class _Stored:
    name: str
    data_type: int
    raw: tuple[int, int] | None  # (offset, nbytes)
    external: bool


def initializer_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, nbytes) of each initializer's raw data in the file, by name.

    >>> import onnx, numpy as np, tempfile
    >>> weight = onnx.numpy_helper.from_array(np.float32([1, 2]), "fc.weight")
    >>> model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight]))
    >>> path = Path(tempfile.mkdtemp()) / "m.onnx"
    >>> _ = path.write_bytes(model.SerializeToString())
    >>> offset, nbytes = initializer_offsets(path)["fc.weight"]
    >>> np.frombuffer(path.read_bytes()[offset : offset + nbytes], np.float32)
    array([1., 2.], dtype=float32)

    Raises ConversionError if the file is not an ONNX model, or holds float32 tensors that cannot be patched in
    place because they are stored as numbers one by one, or in another file; all are named.
    """
    tensors = _read(path)
    problems = [
        f"{t.name} lies in another file" if t.external else f"{t.name} is not stored as raw bytes"
        for t in tensors
        if t.data_type == _FLOAT and t.raw is None
    ]
    if problems:
        advice = "make the file canonical first:"
        raise ConversionError(listed(f"{path} holds tensors that cannot be patched in place; {advice}", problems))
    return {t.name: t.raw for t in tensors if t.raw is not None}


def patch_table(path: Path, file_name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Patch, ...]:
    """The patch table of float32 tensors ``shapes`` in the file at ``path``, called ``file_name`` in the artifact.

    Raises ConversionError naming all tensors that are missing or of another size.
    """
    offsets = initializer_offsets(path)
    problems, patches = [], []
    for name, shape in shapes.items():
        offset, nbytes = offsets.get(name, (0, 0))
        if name not in offsets:
            problems.append(f"{name} is missing")
        elif nbytes != 4 * math.prod(shape):
            problems.append(f"{name} has {nbytes} bytes, expected {4 * math.prod(shape)} for shape {shape}")
        else:
            patches.append(Patch(name, file_name, offset, nbytes, "float32", tuple(shape)))
    if problems:
        raise ConversionError(listed(f"{path} does not hold the tensors to patch:", problems))
    return tuple(patches)


def _read(path: Path) -> list[_Stored]:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = [
                _tensor(content, start, end)
                for graph_start, graph_end in _messages(content, _GRAPH, 0, len(content))
                for start, end in _messages(content, _INITIALIZER, graph_start, graph_end)
            ]
            if not any(_messages(content, _GRAPH, 0, len(content))):
                raise _MalformedError("no graph in it")
    except OSError as err:
        raise ConversionError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:  # also what mmap says of an empty file
        raise ConversionError(f"{path} is not an ONNX model, or was cut short ({err})") from err
    return found


class _MalformedError(ValueError):
    """The bytes are not a protobuf message."""


def _tensor(content: mmap.mmap, start: int, end: int) -> _Stored:
    name, data_type, raw, external = "", 0, None, False
    for field, first, last in _fields(content, start, end):
        if field == _NAME:
            name = content[first:last].decode("utf-8")
        elif field == _DATA_TYPE:
            data_type, _ = _varint(content, first, last)
        elif field == _RAW_DATA:
            raw = (first, last - first)
        elif field == _EXTERNAL_DATA:
            external = True
    return _Stored(name, data_type, raw, external)


def _messages(content: mmap.mmap, wanted: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    return ((first, last) for field, first, last in _fields(content, start, end) if field == wanted)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of each payload between ``start`` and ``end``."""
    at = start
    while at < end:
        key, at = _varint(content, at, end)
        first, last = _payload(content, key & 7, at, end)
        yield key >> 3, first, last
        at = last


def _payload(content: mmap.mmap, wire_type: int, at: int, end: int) -> tuple[int, int]:
    if wire_type == _VARINT:
        return at, _varint(content, at, end)[1]
    if wire_type == _BYTES:
        length, at = _varint(content, at, end)
    elif wire_type in (_FIXED64, _FIXED32):
        length = 8 if wire_type == _FIXED64 else 4
    else:
        raise _MalformedError(f"wire type {wire_type} at byte {at}")
    if at + length > end:
        raise _MalformedError(f"a field of {length} bytes at byte {at} goes past {end}")
    return at, at + length


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A base-128 integer, low groups first, and the position behind it."""
    result = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _MalformedError(f"a number is cut off at byte {at}")
        byte = content[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise _MalformedError(f"a number longer than 10 bytes at byte {at}")
