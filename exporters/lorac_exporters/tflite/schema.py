"""TFLite files: `to_bytes` and `from_bytes` undo each other; `buffer_ranges` says where the numbers lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lorac_exporters.tflite.network import Array, Network
from lorac_exporters.tflite.schema_read import from_bytes
from lorac_exporters.tflite.schema_write import ALIGNMENT, to_bytes, to_pieces
from lorac_runtime.errors import ArtifactError
from lorac_runtime.files import atomic_write
from lorac_runtime.places import ByteRange

__all__ = ["ALIGNMENT", "Ranges", "buffer_ranges", "from_bytes", "save", "to_bytes"]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Where a constant lies in a file: its numbers, and the float32 scales of its quantization if it has one.

    ``shared_with`` names constants, ten at most, whose numbers lie, wholly or in part, in the same bytes.
    """

    data: ByteRange
    scales: ByteRange | None = None
    shared_with: tuple[str, ...] = ()


def save(network: Network, path: Path) -> int:
    """Write a network to a .tflite file, whole or not at all; returns its size in bytes.

    Raises OutputError if it cannot be written, and what `to_bytes` raises.
    """
    pieces = to_pieces(network)
    atomic_write(path, pieces)
    return sum(map(len, pieces))


def buffer_ranges(content: bytes | memoryview, where: str = "the file") -> dict[str, Ranges]:
    """The bytes of each constant of a .tflite file that an operator uses and that has any, by the tensor's name.

    Raises ArtifactError if the file cannot be read or two constants have the same name.
    """
    constants = [tensor for tensor in from_bytes(content, where).constants() if 0 not in tensor.shape]
    names = [tensor.name for tensor in constants]
    if len(set(names)) < len(names):
        raise ArtifactError(f"{where} has several constants of the same name")
    start = _address(np.frombuffer(content, np.uint8))
    places = {t.name: _range(t.data, start) for t in constants if t.data is not None}
    scales = {t.name: _range(t.quantization.scale, start) for t in constants if t.quantization is not None}
    shared = _overlaps(places)
    return {name: Ranges(place, scales.get(name), shared[name]) for name, place in places.items()}


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _range(array: Array, start: int) -> ByteRange:
    return ByteRange(_address(array) - start, array.nbytes)


def _overlaps(places: dict[str, ByteRange]) -> dict[str, tuple[str, ...]]:
    """For each stretch the others that share bytes with it, directly or through others; ten at most."""
    groups: list[list[str]] = []
    end = -1
    for name in sorted(places, key=lambda n: (places[n].offset, n)):
        if places[name].offset >= end:
            groups.append([])
        groups[-1].append(name)
        end = max(end, places[name].offset + places[name].nbytes)
    return {name: tuple(n for n in group[:11] if n != name)[:10] for group in groups for name in group}
