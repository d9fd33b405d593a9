"""A base file: reading its tensors by memory map, and writing a copy in which some have other numbers.

No model format is parsed: the patch table says where each tensor lies.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.channels import Channels
from lorac_runtime.description import BASE
from lorac_runtime.errors import ArtifactError, OutputError
from lorac_runtime.files import atomic_write_at, size_of
from lorac_runtime.places import ByteRange, Patch
from lorac_runtime.stored import Losses, Piece, pieces, ranges

Array = npt.NDArray[Any]
_PIECE = 1 << 20  # bytes of an unchanged stretch at a time
_HELD = 4  # pieces to write before pages of mapped files are let go: the system may map 2 MB for a piece of a few bytes


def mapped(path: Path) -> memoryview:
    """The file's bytes without reading them; pages come in as they are used."""
    try:
        size_of(path)
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as err:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"{path} cannot be read: {err}") from err


def tensor_in(content: memoryview, patch: Patch) -> Array:
    """The float32 tensor of a patch entry in its own shape; a read-only view of a file's ``content`` where it can be.

    Raises ArtifactError if the range leaves the file, ValueError for an entry of another dtype.
    """
    if patch.dtype != "float32":
        raise ValueError(f"{patch.tensor} is {patch.dtype} in {patch.file}; read its float32 numbers from {BASE}")
    _check_range(content, patch, patch.content)
    axes = patch.shape if patch.view is None else patch.view
    order = tuple(range(len(axes))) if patch.permute is None else patch.permute
    stored = np.frombuffer(content[patch.offset : patch.offset + patch.nbytes], "<f4")
    # argsort of a permutation is its inverse
    return stored.reshape([axes[axis] for axis in order]).transpose(np.argsort(order)).reshape(patch.shape)


def write_patched(source: Path, target: Path, patches: Sequence[Patch], values: Mapping[str, Array]) -> None:
    """Write ``source`` to ``target`` with ``values`` in the byte ranges of ``patches``, one value per patch.

    Atomic (see `files.atomic_write`): ``target`` is the whole new file, read back and compared, or untouched.

    Raises ValueError if patches and values do not belong together, ArtifactError if ``source`` cannot be read
    or the ranges overlap or leave it, OutputError if ``target`` cannot be written or is ``source``.
    """
    if {p.tensor for p in patches} != set(values):
        raise ValueError(f"patches and values differ: {sorted({p.tensor for p in patches} ^ set(values))}")
    write_copy(source, target, patches, {name: Channels.of(value) for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class Written:
    """How long values took to compute, and what the file's form could not hold of them."""

    compute_seconds: float
    losses: Losses


def write_copy(
    source: Path,
    target: Path,
    patches: Sequence[Patch],
    values: Mapping[str, Channels],
    *,
    read_from: Sequence[memoryview] = (),
) -> Written:
    """`write_patched` for values that are computed in blocks from the mapped files ``read_from``.

    Raises AdapterError too, for values that the file's form cannot hold at all.
    """
    if same_file(target, source):
        raise OutputError(f"{target} is the base file itself, which is never modified; name another output file")
    for patch in patches:
        if (given := values[patch.tensor].shape) != tuple(patch.shape):
            raise ValueError(f"{patch.tensor} has shape {given}, its patch entry says {tuple(patch.shape)}")
    content, losses = mapped(source), Losses()
    kept = _kept(content, _ordered(content, patches))
    changed = _Stopwatch(pieces(patches, values, losses))
    everything = _letting_go(itertools.chain(kept, changed), (content, *read_from))
    atomic_write_at(target, everything, nbytes=len(content))
    return Written(changed.seconds, losses)


class _Stopwatch(Iterator[Piece]):
    """Hands on what an iterator gives; ``seconds`` is how long it took to make."""

    def __init__(self, source: Iterator[Piece]) -> None:
        self._source, self.seconds = source, 0.0

    def __next__(self) -> Piece:
        started = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.seconds += time.perf_counter() - started


def _letting_go(source: Iterator[Piece], contents: Sequence[memoryview]) -> Iterator[Piece]:
    """Hands pieces on, and tells the system now and then that what was read of the mapped files is not needed.

    It could take these pages back at any time; but as long as it does not they count as memory of this process.
    """
    for count, piece in enumerate(source):
        yield piece
        if count % _HELD == 0:
            for content in contents:
                _let_go(content)


def _let_go(content: memoryview) -> None:
    if isinstance(content.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        content.obj.madvise(mmap.MADV_DONTNEED)


def _ordered(content: memoryview, patches: Sequence[Patch]) -> list[ByteRange]:
    """The stretches that patches write over, in the order of the file."""
    found = sorted(((r, p) for p in patches for r in ranges(p)), key=lambda pair: pair[0].offset)
    end = 0
    for stretch, patch in found:
        if stretch.offset < end:
            raise ArtifactError(f"the patch table has {patch.tensor} overlap another tensor; export again")
        _check_range(content, patch, stretch)
        end = stretch.end
    return [stretch for stretch, _ in found]


def _kept(content: memoryview, changed: Sequence[ByteRange]) -> Iterator[Piece]:
    """The stretches between those that change, in pieces of the file's mapping: nothing is copied."""
    starts, ends = [0, *(r.end for r in changed)], [*(r.offset for r in changed), len(content)]
    for start, end in zip(starts, ends, strict=True):
        yield from ((at, content[at : min(at + _PIECE, end)]) for at in range(start, end, _PIECE))


def _check_range(content: memoryview, patch: Patch, stretch: ByteRange) -> None:
    if stretch.offset < 0 or stretch.end > len(content):
        raise ArtifactError(
            f"{patch.tensor} lies at bytes {stretch.offset}..{stretch.end} of {patch.file}, which "
            f"has {len(content)}; copy or export the artifact again"
        )


def same_file(one: Path, other: Path) -> bool:
    """Whether both name one existing file, links followed."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist, or cannot be reached: opening it will tell
        return False
