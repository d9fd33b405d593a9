"""Fusing: the base file with W + delta in the recorded byte ranges, and every other byte as it was.

No model format is parsed: the patch table of the manifest says where each tensor lies.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lorac_runtime.adapter import load_adapter
from lorac_runtime.base_file import mapped, same_file, tensor_in, write_copy, write_patched
from lorac_runtime.channels import Channels
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError, listed
from lorac_runtime.expected import state_problems
from lorac_runtime.fused import fused_channels, fused_weights
from lorac_runtime.manifest import (
    BASE,
    BASE_TFLITE,
    BATCHNORM,
    FILE_NAME,
    Manifest,
    Patch,
    load,
    verify_files,
)
from lorac_runtime.stored import ranges

__all__ = [
    "FuseReport",
    "base_weights",
    "batchnorm_tensors",
    "check_base",
    "fuse",
    "fused_weights",
    "read_tensor",
    "write_patched",
]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: names of the tensors with other numbers, bytes written over, seconds per part.

    ``read_seconds`` holds the reading and the hash check of the base, ``write_seconds`` the writing, flushing
    and reading back of the fused file; ``compute_seconds`` is what fusing itself takes.

    ``overflowed`` counts numbers too large for a float16 file, stored as the largest that it holds; ``saturated``
    names biases that an int8 file could not hold in full.
    """

    tensors: tuple[str, ...]
    bytes_patched: int
    read_seconds: float
    compute_seconds: float
    write_seconds: float
    overflowed: int = 0
    saturated: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.read_seconds + self.compute_seconds + self.write_seconds


def fuse(folder: Path, target: Path, state: Mapping[str, Array], *, base: str = BASE) -> FuseReport:
    """Write a base file of the artifact in ``folder`` with the trained ``state`` fused into it to ``target``.

    ``base`` is base.onnx or base.tflite. ``state`` holds every trainable tensor and, under the policies ``batch`` and
    ``recalibrate``, the running statistics, in the coordinates of the manifest. Weights are always computed from the
    float32 numbers in base.onnx. Base files are checked against their sha256 and never modified. It goes block by
    block: memory is needed for some megabytes, not for a model.

    Raises ArtifactError for a damaged artifact or one without ``base``, AdapterError for a state that does not fit
    (all mismatches at once), OutputError if ``target`` cannot be written or is a file of the artifact.
    """
    started = time.perf_counter()
    manifest = _checked(folder, target, state, base)
    content, batchnorm = mapped(folder / BASE), batchnorm_tensors(folder, manifest)
    read = time.perf_counter()
    originals = _weights(content, manifest)
    values = fused_channels(manifest, originals, state, batchnorm)
    values |= _partners(manifest, base, values, originals)
    patches = _entries(manifest, base, values)
    prepared = time.perf_counter()
    written = write_copy(folder / base, target, patches, values, read_from=(content,))
    return FuseReport(
        tensors=tuple(p.tensor for p in patches),
        bytes_patched=sum(r.nbytes for p in patches for r in ranges(p)),
        read_seconds=read - started,
        compute_seconds=prepared - read + written.compute_seconds,
        write_seconds=time.perf_counter() - prepared - written.compute_seconds,
        overflowed=written.losses.overflowed,
        saturated=tuple(written.losses.saturated),
    )


def _checked(folder: Path, target: Path, state: Mapping[str, Array], base: str) -> Manifest:
    """The manifest, once everything fits that can be checked before anything is computed."""
    manifest = load(folder)
    check_base(folder, manifest, base)
    _refuse_own_files(folder, target, manifest)
    problems = state_problems(manifest, state)
    if problems:
        raise AdapterError(listed(f"the trained state does not fit the artifact of {manifest.model!r}:", problems))
    verify_files(folder, manifest, tuple(dict.fromkeys((BASE, base))))
    return manifest


def _entries(manifest: Manifest, base: str, values: Mapping[str, Channels]) -> list[Patch]:
    """Rows of the patch table for each value."""
    patches = [p for p in manifest.patches if p.file == base and p.tensor in values]
    missing = sorted(values.keys() - {p.tensor for p in patches})
    if missing:
        raise ArtifactError(
            f"the patch table has no entry for {', '.join(missing)} in {base}; export the artifact again"
        )
    shapes = {p.tensor: (values[p.tensor].shape, tuple(p.shape)) for p in patches}
    wrong = [f"{name} has shape {has}, its entry says {says}" for name, (has, says) in shapes.items() if has != says]
    if wrong:
        raise ArtifactError(listed("the patch table does not fit the network; export the artifact again:", wrong))
    return patches


def check_base(folder: Path, manifest: Manifest, base: str) -> None:
    """Raises ArtifactError if the artifact in ``folder`` holds no file ``base`` to fuse into."""
    if base not in manifest.files or base not in (BASE, BASE_TFLITE):
        held = " and ".join(name for name in (BASE, BASE_TFLITE) if name in manifest.files)
        raise ArtifactError(
            f"{folder} has no {base} to fuse into, it has {held}; export the artifact again with {base}, or leave that "
            "format out"
        )


def _partners(
    manifest: Manifest, base: str, values: Mapping[str, Channels], originals: Mapping[str, Array]
) -> dict[str, Channels]:
    """Tensors without a change of their own that are stored anew, because scales depend on weight and bias."""
    found = {
        p.quantization.partner for p in manifest.patches if p.quantization and p.tensor in values and p.file == base
    }
    return {name: Channels.of(originals[name]) for name in found if name is not None and name not in values}


def read_tensor(folder: Path, patch: Patch) -> Array:
    """The tensor that a patch entry points to, in its own shape (``permute`` undone); float32, writable.

    Raises ArtifactError if the file is missing or too short.
    """
    return tensor_in(mapped(folder / patch.file), patch).copy()


def base_weights(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """Every tensor of the patch table as base.onnx has it, float32; read-only views of the file, not copies.

    Raises ArtifactError if the file is missing or too short.
    """
    return _weights(mapped(folder / BASE), manifest)


def _weights(content: memoryview, manifest: Manifest) -> dict[str, Array]:
    return {p.tensor: tensor_in(content, p) for p in manifest.patches if p.file == BASE}


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


def _refuse_own_files(folder: Path, target: Path, manifest: Manifest) -> None:
    if any(same_file(target, folder / name) for name in (FILE_NAME, *manifest.files)):
        raise OutputError(f"{target} is a file of the training artifact; name another output file")
