"""Files appear whole or not at all: written beside the target, flushed, checked, renamed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lorac_runtime.errors import BusyError, OutputError

Buffer = bytes | memoryview
log = logging.getLogger(__name__)
_READ = 1 << 20  # bytes at a time when a file is read back
_LOCKED_BYTE = 1 << 62  # where Windows locks: far behind any content, which stays readable

_ADVICE = {
    errno.ENOSPC: "Free some space or choose another output folder.",
    errno.EDQUOT: "Free some space or choose another output folder.",
    errno.EFBIG: "The file system or a limit of this process allows no file of that size.",
    errno.EACCES: "Choose an output folder that you may write to.",
    errno.EPERM: "Choose an output folder that you may write to.",
    errno.EROFS: "Choose an output folder that you may write to.",
    errno.ENOENT: "Create the folder first.",
    errno.ENOTDIR: "A part of the path is a file, not a folder.",
    errno.EISDIR: "There is a folder of that name.",
}


def size_of(path: Path, most: int | None = None) -> int:
    """Bytes of a regular file, which is what everything that comes from outside has to be.

    A pipe would be waited for and a device read without end. Raises OSError saying so, or that it has more than
    ``most`` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise OSError(f"it is {kind}, expected a file")
    if most is not None and found.st_size > most:
        raise OSError(f"it has {found.st_size:,} bytes, at most {most:,} are expected")
    return found.st_size


def atomic_write(target: Path, content: Buffer | Sequence[Buffer]) -> None:
    """Write bytes, or several pieces of bytes one after the other, as the whole of ``target``.

    Read back and compared before the rename, so a target that exists is either the old file or the new one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder) / "a.bin", [b"12", b"3"])
    ...     (Path(folder) / "a.bin").read_bytes()
    b'123'

    Raises OutputError if the file cannot be written; then nothing is left behind.
    """
    pieces = [content] if isinstance(content, bytes | memoryview) else content
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    atomic_write_at(target, zip(ends, pieces, strict=False), nbytes=ends[-1])


def atomic_write_at(target: Path, pieces: Iterable[tuple[int, Buffer]], *, nbytes: int) -> None:
    """Write pieces, each with the offset where it belongs, as the whole of ``target``; `atomic_write` otherwise.

    They come in any order and are used one at a time, so that an iterator needs no more memory than its largest piece.
    What is read back is compared by the checksum (CRC-32) of each piece.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write_at(Path(folder) / "a.bin", iter([(2, b"3"), (0, b"12")]), nbytes=3)
    ...     (Path(folder) / "a.bin").read_bytes()
    b'123'

    Raises OutputError if the file cannot be written, ValueError if the pieces are not each of its ``nbytes`` bytes
    once; then, and if ``pieces`` raises, nothing is left behind.
    """
    with staged(target) as part:
        with part.open("wb") as stream:
            written = sorted(_put(stream, offset, piece) for offset, piece in pieces)
            stream.flush()
            os.fsync(stream.fileno())
        if [offset for offset, _, _ in written] + [nbytes] != [0, *(offset + n for offset, n, _ in written)]:
            raise ValueError(f"the pieces of {target} are not each of its {nbytes} bytes once")
        if not _holds(part, written):
            raise OutputError(f"{target} was not written: reading it back gave other bytes. Is the disk sound?")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; on leaving the block it is flushed to disk and renamed to it.

    For writers that want a path; `atomic_write` is for bytes. If the block raises, ``target`` stays as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with staged(Path(folder) / "a.txt") as part:
    ...         _ = part.write_text("whole")
    ...     [p.name for p in Path(folder).iterdir()]
    ['a.txt']

    Raises OutputError for every OSError inside of the block or of the rename.
    """
    # The process number lets two runs into one folder collide only at the rename, where the last one wins.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)  # it could be a link
        yield part
        _flush(part)
        part.replace(target)
        flush_folder(target.parent)
    except OSError as err:
        raise OutputError(_explained(target, err)) from err
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def output_folder(folder: Path) -> Path:
    """Create ``folder`` where it is missing, and prove that files can be written into it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     output_folder(Path(parent) / "a" / "b").is_dir()
    True

    Raises OutputError, before any work was done in vain.
    """
    probe = folder / ".probe"  # always the same: what a killed process left is removed by the next one
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError), probe.open("xb") as stream:  # another process proves the same
            stream.write(b"\0")
    except OSError as err:
        raise OutputError(_explained(folder, err)) from err
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return folder


def _put(stream: BinaryIO, offset: int, piece: Buffer) -> tuple[int, int, int]:
    """Write a piece; its offset, length and checksum."""
    if stream.tell() != offset:
        stream.seek(offset)
    stream.write(piece)
    return offset, len(piece), zlib.crc32(piece)


def _holds(path: Path, written: Iterable[tuple[int, int, int]]) -> bool:
    """Whether the file is made of pieces of these lengths and checksums, and nothing else."""
    with path.open("rb") as stream:
        return all(_checksum(stream, nbytes) == crc for _, nbytes, crc in written) and not stream.read(1)


def _checksum(stream: BinaryIO, nbytes: int) -> int | None:
    """Of the next bytes of the file; None if it has less."""
    crc = 0
    while nbytes:
        found = stream.read(min(nbytes, _READ))
        if not found:
            return None
        crc, nbytes = zlib.crc32(found, crc), nbytes - len(found)
    return crc


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def lock(stream: BinaryIO) -> bool:
    """Keep a file for this process until the stream is closed or the process ends; False if another one has it.

    Raises OSError where the file system has no locks.
    """
    try:
        _lock_now(stream.fileno())
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process: no other one gets past this line until the block is left or the process ends.

    Only processes that ask are kept out. No file is made for it, but on Windows, where folders cannot be locked.

    Raises BusyError if another process has it, OutputError if it cannot be opened.
    """
    try:
        handle = _opened_to_lock(folder)
    except OSError as err:
        raise OutputError(_explained(folder, err)) from err
    try:
        _lock_now(handle)
    except (BlockingIOError, PermissionError) as err:
        os.close(handle)
        raise BusyError(f"{folder} is in use by another process; wait for it, or choose another folder") from err
    except OSError as err:
        log.warning("%s lies on a file system without locks (%s): let one process at a time use it", folder, err)
    try:
        yield
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _opened_to_lock(folder: Path) -> int:
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)

    def _lock_now(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(handle, 0, os.SEEK_SET)

else:
    import fcntl

    def _opened_to_lock(folder: Path) -> int:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def _lock_now(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explained(target: Path, err: OSError) -> str:
    advice = _ADVICE.get(err.errno or 0, "")
    return f"cannot write {target}: {err.strerror or err}. {advice}".rstrip()
