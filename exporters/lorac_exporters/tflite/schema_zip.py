"""Files appended to a .tflite file as a zip archive, where apps look for labels.

Offsets inside of the archive count from the start of the whole file, as if it had been appended by a zip tool: some
readers of TFLite metadata take them as they are.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from lorac_runtime.errors import ArtifactError

_TIME = (1980, 1, 1, 0, 0, 0)  # the zip format's own zero; the same bytes each time
# What reading a damaged archive can raise, encrypted and unknown methods included.
_DAMAGE = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError, struct.error, LookupError)
_MOST_FILES = 1000
_MOST_BYTES = 1 << 26  # what apps append are labels and vocabularies


def archive(files: Mapping[str, bytes], start: int) -> bytes:
    """A zip archive, not compressed, that will lie at byte ``start`` of a file."""
    stream = _Later(start)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as target:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # the same on every system
            target.writestr(entry, content)
    return stream.getvalue()


def appended(content: memoryview) -> dict[str, bytes]:
    """The files in a zip archive at the end of ``content``; none if there is no archive.

    Raises ArtifactError if there is one that cannot be read or that holds more than labels would need.
    """
    stream = io.BufferedReader(_View(content))
    if not zipfile.is_zipfile(stream):
        return {}
    try:
        with zipfile.ZipFile(stream) as source:
            entries = source.infolist()
            if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise ArtifactError("the files appended to it are larger than 64 MB, or more than 1000")
            return {entry.filename: source.read(entry) for entry in entries}
    except _DAMAGE as err:
        raise ArtifactError(f"the files appended to it cannot be read: {err}") from err


class _Later(io.BytesIO):
    """A stream whose first byte is counted as byte ``start``."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self._start = start

    def tell(self) -> int:
        return self._start + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._start + super().seek(offset - self._start if whence == io.SEEK_SET else offset, whence)


class _View(io.RawIOBase):
    """A stream over bytes in memory that are not copied."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content = content
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._content)}[whence]
        if base + offset < 0:
            raise OSError(f"no byte {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, target: Any, /) -> int:
        piece = self._content[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
