"""Fusing: the base file with W + delta in the recorded byte ranges, and every other byte as it was.

No model format is parsed: the patch table of the manifest says where each tensor lies.
"""

from __future__ import annotations

import dataclasses
import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError, listed
from lorac_runtime.expected import state_problems
from lorac_runtime.files import Buffer, atomic_write
from lorac_runtime.fused import fused_weights
from lorac_runtime.manifest import BASE, BATCHNORM, FILE_NAME, Manifest, Patch, load, verify_files

__all__ = ["FuseReport", "base_weights", "batchnorm_tensors", "fuse", "fused_weights", "read_tensor", "write_patched"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: names of the tensors with other numbers, bytes written over, seconds per part.

    ``read_seconds`` holds the reading and the hash check of the base, ``write_seconds`` the writing, flushing
    and reading back of the fused file; ``compute_seconds`` is what fusing itself takes.
    """

    tensors: tuple[str, ...]
    bytes_patched: int
    read_seconds: float
    compute_seconds: float
    write_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.read_seconds + self.compute_seconds + self.write_seconds


def fuse(folder: Path, target: Path, state: Mapping[str, Array]) -> FuseReport:
    """Write the base of the artifact in ``folder`` with the trained ``state`` fused into it to ``target``.

    ``state`` holds every trainable tensor and, under the policies ``batch`` and ``recalibrate``, the running
    statistics, in the coordinates of the manifest. The base is checked against its sha256 and never modified.

    Raises ArtifactError for a damaged artifact, AdapterError for a state that does not fit (all mismatches at
    once), OutputError if ``target`` cannot be written or is a file of the artifact.
    """
    started = time.perf_counter()
    manifest = load(folder)
    _refuse_own_files(folder, target, manifest)
    problems = state_problems(manifest, state)
    if problems:
        raise AdapterError(listed(f"the trained state does not fit the artifact of {manifest.model!r}:", problems))
    verify_files(folder, manifest, (BASE,))
    base, batchnorm = base_weights(folder, manifest), batchnorm_tensors(folder, manifest)
    read = time.perf_counter()
    values = fused_weights(manifest, base, state, batchnorm)
    computed = time.perf_counter()
    patches = [p for p in manifest.patches if p.file == BASE and p.tensor in values]
    write_patched(folder / BASE, target, patches, values)
    return FuseReport(
        tensors=tuple(p.tensor for p in patches),
        bytes_patched=sum(p.nbytes for p in patches),
        read_seconds=read - started,
        compute_seconds=computed - read,
        write_seconds=time.perf_counter() - computed,
    )


def read_tensor(folder: Path, patch: Patch) -> Array:
    """The tensor that a patch entry points to, in its own shape (``permute`` undone); float32, writable.

    Raises ArtifactError if the file is missing or too short.
    """
    return _view(_mapped(folder / patch.file), patch).copy()


def base_weights(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """Every tensor of the patch table as base.onnx has it, float32; read-only views of the file, not copies.

    Raises ArtifactError if the file is missing or too short.
    """
    content = _mapped(folder / BASE)
    return {p.tensor: _view(content, p) for p in manifest.patches if p.file == BASE}


def batchnorm_tensors(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """The content of batchnorm.safetensors, checked against its sha256; nothing where the base had no BN.

    Raises ArtifactError if the file is damaged.
    """
    if BATCHNORM not in manifest.files:
        return {}
    verify_files(folder, manifest, (BATCHNORM,))
    try:
        return load_adapter(folder / BATCHNORM).tensors
    except AdapterError as err:
        raise ArtifactError(str(err)) from err


def write_patched(source: Path, target: Path, patches: Sequence[Patch], values: Mapping[str, Array]) -> None:
    """Write ``source`` to ``target`` with ``values`` in the byte ranges of ``patches``, one value per patch.

    Atomic (see `files.atomic_write`): ``target`` is the whole new file, read back and compared, or untouched.

    Raises ValueError if patches and values do not belong together, ArtifactError if ``source`` cannot be read
    or the ranges overlap or leave it, OutputError if ``target`` cannot be written or is ``source``.
    """
    if _same(target, source):
        raise OutputError(f"{target} is the base file itself, which is never modified; name another output file")
    ordered = sorted(patches, key=lambda patch: patch.offset)
    if {p.tensor for p in ordered} != set(values):
        raise ValueError(f"patches and values differ: {sorted({p.tensor for p in ordered} ^ set(values))}")
    atomic_write(target, _pieces(_mapped(source), ordered, values))


def _pieces(source: memoryview, ordered: Sequence[Patch], values: Mapping[str, Array]) -> list[Buffer]:
    """The new file: stretches of the source and new values in turn. One pass, and no copy of what stays."""
    pieces: list[Buffer] = []
    end = 0
    for patch in ordered:
        if patch.offset < end:
            raise ArtifactError(f"the patch table has {patch.tensor} overlap another tensor; export again")
        _check_range(source, patch)
        pieces += [source[end : patch.offset], _bytes(values[patch.tensor], patch)]
        end = patch.offset + patch.nbytes
    return [*pieces, source[end:]]


def _bytes(value: Array, patch: Patch) -> memoryview:
    if value.shape != tuple(patch.shape):
        raise ValueError(f"{patch.tensor} has shape {value.shape}, its patch entry says {tuple(patch.shape)}")
    stored = value if patch.permute is None else value.transpose(patch.permute)
    return np.ascontiguousarray(stored, "<f4").data.cast("B")


def _view(content: memoryview, patch: Patch) -> Array:
    _check_range(content, patch)
    order = tuple(range(len(patch.shape))) if patch.permute is None else patch.permute
    stored = np.frombuffer(content[patch.offset : patch.offset + patch.nbytes], "<f4")
    # argsort of a permutation is its inverse
    return stored.reshape([patch.shape[axis] for axis in order]).transpose(np.argsort(order))


def _check_range(content: memoryview, patch: Patch) -> None:
    if patch.offset < 0 or patch.offset + patch.nbytes > len(content):
        raise ArtifactError(
            f"{patch.tensor} lies at bytes {patch.offset}..{patch.offset + patch.nbytes} of {patch.file}, which "
            f"has {len(content)}; copy or export the artifact again"
        )


def _mapped(path: Path) -> memoryview:
    """The file's bytes without reading them; pages come in as they are used."""
    try:
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as err:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"{path} cannot be read: {err}") from err


def _refuse_own_files(folder: Path, target: Path, manifest: Manifest) -> None:
    if any(_same(target, folder / name) for name in (FILE_NAME, *manifest.files)):
        raise OutputError(f"{target} is a file of the training artifact; name another output file")


def _same(one: Path, other: Path) -> bool:
    """Whether both name one existing file, links followed."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist, or cannot be reached: opening it will tell
        return False
