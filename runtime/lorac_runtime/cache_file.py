"""Rows of bytes on disk, by sample, within a byte budget: what `lorac_runtime.cache` keeps features in.

features.bin holds rows of one length, one after the other; index.bin a header and, for each row, a record of the sample
it belongs to and its checksum. A row is written before its record, and its checksum is compared when it is first read,
so a run that was killed, or a power cut, costs rows at most. Reading trusts nothing: what does not fit is discarded.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import CacheError, OutputError
from lorac_runtime.files import lock

INDEX, ROWS = "index.bin", "features.bin"
MAGIC = b"lorac-cache-1\n\0\0"
_HEADER = struct.Struct("<16s32sQI")  # magic, key of the frozen part, bytes of a row, checksum of what comes before
_RECORD = struct.Struct("<16s16sII")  # digests of the sample's id and content, checksum of its row, and of these three
Sample = tuple[bytes, bytes]  # digests of id and content, 16 bytes each

log = logging.getLogger(__name__)


def capacity(budget: int, row: int) -> int:
    """How many rows of ``row`` bytes ``budget`` bytes hold, the index included.

    >>> capacity(60 + 3 * (100 + 40), 100), capacity(60 + 3 * (100 + 40) - 1, 100), capacity(7, 100)
    (3, 2, 0)
    """
    return max(0, budget - _HEADER.size) // (row + _RECORD.size)


def space(samples: int, row: int) -> int:
    """Bytes that hold so many rows: the inverse of `capacity`."""
    return _HEADER.size + samples * (row + _RECORD.size)


class CacheFile:
    """Rows of ``row`` bytes in ``folder``, at most ``budget`` bytes in all, valid for ``key`` (32 bytes).

    Only rows of the samples ``wanted`` stay; others make room. Raises CacheError if another process uses the folder,
    OutputError if it cannot be written.
    """

    def __init__(self, folder: Path, *, key: bytes, row: int, budget: int, wanted: Collection[Sample]) -> None:
        self._row, self._limit = row, capacity(budget, row)
        self._places: dict[Sample, int] = {}
        self._checksums: dict[Sample, int] = {}  # of rows that were not read since they were opened
        self._full = False
        with contextlib.ExitStack() as opened:
            try:
                folder.mkdir(exist_ok=True)
                self._index, self._rows = (opened.enter_context(_opened(folder / name)) for name in (INDEX, ROWS))
                if not lock(self._index):
                    advice = "wait for it, or choose another output folder"
                    raise CacheError(f"{folder} is used by another run; {advice}")
                self._begin(_HEADER.pack(MAGIC, key, row, 0)[:-4], set(wanted), folder)
            except OSError as err:
                raise OutputError(f"{folder} cannot hold a cache: {err.strerror or err}") from err
            opened.pop_all()  # all is well: they stay open

    def _begin(self, header: bytes, wanted: set[Sample], folder: Path) -> None:
        header += struct.pack("<I", zlib.crc32(header))
        found = self._index.read(_HEADER.size)
        if found == header:
            self._take_over(wanted)
        else:
            if found:
                log.info("%s is of another model, another version or damaged: it starts empty", folder)
            self._rewrite(header)
        self._fit()

    def _take_over(self, wanted: set[Sample]) -> None:
        rows = _length(self._rows) // self._row
        records = self._index.read(min(rows, self._limit) * _RECORD.size)
        for place, (*sample, checksum, own) in enumerate(_RECORD.iter_unpack(_whole(records))):
            found = (bytes(sample[0]), bytes(sample[1]))
            if own == zlib.crc32(records[place * _RECORD.size :][: _RECORD.size - 4]) and found in wanted:
                self._places[found] = place
                self._checksums[found] = checksum

    def _rewrite(self, header: bytes) -> None:
        for stream in (self._index, self._rows):
            stream.seek(0)
            stream.truncate()
        self._index.write(header)

    def _fit(self) -> None:
        """Cut off what lies behind the last row that counts, and note which places before it are free."""
        end = max(self._places.values(), default=-1) + 1
        self._index.truncate(_HEADER.size + end * _RECORD.size)
        self._rows.truncate(end * self._row)
        taken = set(self._places.values())
        self._free = [place for place in range(end - 1, -1, -1) if place not in taken]
        self._end = end

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sample: Sample) -> bool:
        return sample in self._places

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of the files as they are now."""
        return _length(self._index) + _length(self._rows)

    def read(self, samples: Sequence[Sample]) -> tuple[list[int], npt.NDArray[np.uint8]]:
        """(which of ``samples`` are kept and whole, by their index; their rows, one below the other)."""
        self._cut(_length(self._rows) // self._row)
        kept = [i for i, sample in enumerate(samples) if sample in self._places]
        try:
            rows = self._gathered([self._places[samples[i]] for i in kept])
        except OSError as err:
            log.warning("the cache cannot be read (%s); the run goes on without", err.strerror or err)
            self._places.clear()
            self._full = True
            return [], np.empty((0, self._row), np.uint8)
        if not self._checksums:
            return kept, rows
        sound = [n for n, i in enumerate(kept) if self._sound(samples[i], rows[n])]
        return [kept[n] for n in sound], rows[sound]

    def _cut(self, whole: int) -> None:
        """Forget what lay behind the first ``whole`` rows, if somebody cut the file."""
        if whole < self._end:
            log.info("the cache's file was cut to %d rows: those behind are computed again", whole)
            for sample in [sample for sample, place in self._places.items() if place >= whole]:
                del self._places[sample]
                self._checksums.pop(sample, None)
            self._free = [place for place in self._free if place < whole]
            self._end = whole

    def _gathered(self, places: list[int]) -> npt.NDArray[np.uint8]:
        """The rows at ``places``. Read, not mapped: touching a page of a map takes longer than reading a row."""
        rows = np.zeros((len(places), self._row), np.uint8)
        for place, row in zip(places, rows, strict=True):
            self._rows.seek(place * self._row)
            if self._rows.readinto(row.data) != self._row:
                raise OSError(f"a row of {self._row} bytes ends early")
        return rows

    def _sound(self, sample: Sample, row: npt.NDArray[np.uint8]) -> bool:
        """Whether a row is what was written; looked at once, and forgotten if it is not."""
        checksum = self._checksums.pop(sample, None)
        if checksum is None or checksum == zlib.crc32(row.data):
            return True
        log.info("a row of the cache is damaged: it is computed again")
        self._free.append(self._places.pop(sample))
        return False

    def write(self, sample: Sample, row: bytes) -> bool:
        """Keep a row, if there is room for it; False if not."""
        if len(row) != self._row:
            raise ValueError(f"a row of {len(row)} bytes where all have {self._row}")
        if self._full or sample in self._places or not (self._free or self._end < self._limit):
            return sample in self._places
        place = self._free[-1] if self._free else self._end
        try:
            self._put(place, sample, row)
        except OSError as err:
            self._full = True
            log.warning("the cache cannot grow (%s); the run goes on with what it holds", err.strerror or err)
            return False
        self._places[sample] = place
        if self._free:
            self._free.pop()
        else:
            self._end += 1
        return True

    def _put(self, place: int, sample: Sample, row: bytes) -> None:
        _write(self._rows, place * self._row, row)
        record = _RECORD.pack(*sample, zlib.crc32(row), 0)[:-4]
        _write(self._index, _HEADER.size + place * _RECORD.size, record + struct.pack("<I", zlib.crc32(record)))

    def empty(self) -> None:
        """Forget every row."""
        self._places.clear()
        self._checksums.clear()
        self._fit()

    def close(self) -> None:
        """Let another process use the folder."""
        self._index.close()
        self._rows.close()


def _opened(path: Path) -> FileIO:
    """An unbuffered stream to read and write; links are refused, since what they lead to would be overwritten."""
    if path.is_symlink():
        raise OutputError(f"{path} is a link; a cache keeps files of its own: remove it")
    path.touch()
    return path.open("rb+", buffering=0)


def _write(stream: FileIO, offset: int, content: bytes) -> None:
    stream.seek(offset)
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]


def _length(stream: FileIO) -> int:
    return stream.seek(0, 2)


def _whole(records: bytes) -> bytes:
    return records[: len(records) // _RECORD.size * _RECORD.size]
