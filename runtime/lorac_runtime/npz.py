"""An ``.npz`` file, looked at before any of it is unpacked: a few bytes can say that they are a terabyte."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import DataError
from lorac_runtime.files import size_of

SMALL = 64 << 20  # bytes that are unpacked even if they turn out to be of no use: the messages are better then
_SUFFIX = ".npy"
_SINGLE = b"\x93NUMPY"  # how a file of one array begins
NEED_LABELS = "Only artifacts of the methods tent and recalibrate adapt a model without labels; others learn from them."

# What zip archives, compression and the headers of arrays raise when they are damaged; RuntimeError: encrypted.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    SyntaxError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Header:
    """What an array in the file says of itself."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    nbytes: int


def headers(stream: BinaryIO, path: Path, names: Sequence[str]) -> dict[str, Header]:
    """Those of the arrays ``names`` that are there, each as large as it says. The stream is back at its begin.

    Raises DataError for arrays of another size than they say, or beyond this machine's memory; ValueError for Python
    objects, and what zipfile and numpy raise on damaged files.
    """
    with zipfile.ZipFile(stream) as archive:
        found = {name: _header(archive, path, name) for name in names if name + _SUFFIX in archive.namelist()}
    stream.seek(0)
    total, memory = sum(header.nbytes for header in found.values()), _memory()
    if memory is not None and total > memory:
        raise DataError(
            f"{path} says it holds {total / 1e9:,.1f} GB, more than fits into memory ({memory / 1e9:,.1f} GB)"
        )
    return found


def require_shape(path: Path, name: str, header: Header, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise DataError for a large array none of whose ``shapes`` (of one sample) is expected: unpacking is no use."""
    if header.nbytes > SMALL and header.shape[1:] not in shapes:
        expected = " or ".join(f"(N{''.join(f', {size}' for size in shape)})" for shape in shapes)
        raise DataError(f"{name} of {path} have shape {header.shape}, expected {expected}")


def _header(archive: zipfile.ZipFile, path: Path, name: str) -> Header:
    entry = archive.getinfo(name + _SUFFIX)
    with archive.open(entry) as member:
        shape, dtype = _read(member)
        begin = member.tell()
    if dtype.hasobject or any(size < 0 for size in shape):
        raise ValueError(f"{name} are {dtype} {shape}")
    nbytes = math.prod(shape) * dtype.itemsize
    if begin + nbytes != entry.file_size:
        raise DataError(
            f"{path} is damaged: {name} are {dtype} {shape}, which takes {nbytes:,} bytes, but there are "
            f"{entry.file_size - begin:,}"
        )
    return Header(shape, dtype, nbytes)


def _read(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    else:  # raises ValueError for what is no (2, 0) header: such files hold names that arrays of numbers do not have
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    return shape, dtype


def _memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def read_npz(path: Path, key: str = "images") -> tuple[Array, Array]:
    """``images`` (or what ``key`` says) and ``labels`` of a file as they are stored; their contents are not checked.

    Pickling is off. Raises DataError.
    """
    images, labels, _ = read_arrays(path, key, needed=(key, "labels"))
    assert labels is not None
    return images, labels


def read_arrays(
    path: Path, key: str, *, needed: Sequence[str], shapes: Sequence[tuple[int, ...]] | None = None
) -> tuple[Array, Array | None, Array | None]:
    """(``key``, labels, ids) of a file, the last two None where they are missing; their contents are not checked.

    ``shapes`` of one sample are those that are expected of a large array.

    Raises DataError if one of the ``needed`` is missing, or the file is damaged, no archive, or would unpack to more
    than there is any use for.
    """
    known = {key: shapes, "labels": [()], "ids": [()]}
    found = read_named(path, known, needed=needed)
    return found[key], found.get("labels"), found.get("ids")


def read_named(
    path: Path, known: Mapping[str, Sequence[tuple[int, ...]] | None], *, needed: Sequence[str]
) -> dict[str, Array]:
    """The arrays of a file that are ``known``, by name, with the shapes of one sample that are expected of large ones.

    None: any. Raises what `read_arrays` raises.
    """
    advice = f"save it with numpy.savez(path, {', '.join(f'{name}=...' for name in needed)})"
    try:
        size_of(path)
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as stream:
            if stream.read(len(_SINGLE)) == _SINGLE:
                raise DataError(f"{path} holds a single array, not {' and '.join(needed)}; {advice}")
            _check_headers(path, headers(stream, path, tuple(known)), known)
            archive = np.load(stream, allow_pickle=False)
            missing = [name for name in needed if name not in archive.files]
            if missing:
                why = f". {NEED_LABELS}" if missing == ["labels"] else ""
                raise DataError(f"{path} has no {' and no '.join(missing)}, only {archive.files}; {advice}{why}")
            return {name: archive[name] for name in known if name in archive.files}
    except MemoryError as err:
        raise DataError(f"{path} says it holds more than fits into memory ({err})") from err
    except _DAMAGED as err:
        raise DataError(f"{path} is not a readable .npz of plain arrays ({err}); {advice}") from err


def _check_headers(
    path: Path, found: Mapping[str, Header], known: Mapping[str, Sequence[tuple[int, ...]] | None]
) -> None:
    """Raise DataError for arrays that are too large to be looked at, and of no use."""
    for name, header in found.items():
        if (expected := known[name]) is not None:
            require_shape(path, name, header, expected)
