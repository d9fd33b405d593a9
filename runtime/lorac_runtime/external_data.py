"""Which other files an ONNX file reads its tensors from: they have to be files of the artifact.

Until 2025 onnxruntime opened whatever a file names, so ``../../secret`` too. Of the format (protocol buffers,
onnx.proto) only so much is walked as leads to tensors; their contents are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorac_runtime.base_file import mapped
from lorac_runtime.errors import ArtifactError, listed
from lorac_runtime.manifest import Manifest

# Message -> number of a field -> the message in it, for all fields that lead to tensors.
_INNER: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # fields of an Entry
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_LONGEST = 10  # bytes of a varint


def require_own_data(folder: Path, manifest: Manifest) -> None:
    """Make sure that the artifact's ONNX files read tensors from files of the artifact alone.

    Raises ArtifactError naming every other file that one reads, or a file that is no ONNX file.
    """
    problems = []
    for name in manifest.files:
        if name.endswith(".onnx"):
            foreign = sorted(set(locations(folder / name)) - set(manifest.files))
            problems += [f"{name} reads {place!r}, which is no file of the artifact" for place in foreign]
    if problems:
        raise ArtifactError(listed(f"{folder} is not safe to use:", problems))


def locations(path: Path) -> list[str]:
    """The files, relative to its folder, that an ONNX file says its tensors are in.

    Raises ArtifactError if it is no ONNX file.
    """
    content = mapped(path)
    try:
        return list(_locations(content))
    except (IndexError, ValueError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path} is no ONNX file, or is damaged; copy or export the artifact again") from err


def _locations(content: memoryview) -> Iterator[str]:
    """Depth does not matter: what is still to be looked at waits in a list."""
    waiting = [("Model", content)]
    while waiting:
        message, part = waiting.pop()
        inner = _INNER[message]
        for number, value in _fields(part):
            kind = inner.get(number)
            if kind == "Entry":
                yield from _location(value)
            elif kind is not None:
                waiting.append((kind, value))


def _location(entry: memoryview) -> Iterator[str]:
    found = {number: bytes(value) for number, value in _fields(entry)}
    if found.get(_KEY) == b"location":
        yield found.get(_VALUE, b"").decode()


def _fields(part: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that holds bytes. Raises ValueError or IndexError where there is none."""
    at, end = 0, len(part)
    while at < end:
        tag, at = _varint(part, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(part, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            length, at = _varint(part, at)
            if at + length > end:
                raise ValueError("a field ends behind its message")
            yield tag >> 3, part[at : at + length]
            at += length
        else:
            raise ValueError(f"no wire type {wire}")
    if at != end:
        raise ValueError("a field ends behind its message")


def _varint(part: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    value = 0
    for index in range(_LONGEST):
        byte = part[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number of more than 64 bits")
