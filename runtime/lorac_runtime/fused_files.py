"""The fused files of a run: one for each format, made from its last state, or later from its adapter file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lorac_runtime.adapter import load_adapter, most_bytes
from lorac_runtime.config import FORMATS
from lorac_runtime.errors import AdapterError, OutputError, listed
from lorac_runtime.expected import adapter_problems
from lorac_runtime.manifest import ADAPTER, Manifest
from lorac_runtime.outputs import FUSED
from lorac_runtime.patch import fuse
from lorac_runtime.report import FinetuneReport, FusedFile, write_report

log = logging.getLogger(__name__)


def write_fused(
    artifact: Path, out: Path, state: Mapping[str, npt.NDArray[Any]], to: Iterable[str]
) -> tuple[FusedFile, ...]:
    """Fuse ``state`` into a copy of the base file of each format. Raises what `patch.fuse` raises."""
    return tuple(_fused(artifact, out / FUSED[name], state, FORMATS[name]) for name in to)


def missing_formats(out: Path, report: FinetuneReport, to: Sequence[str]) -> tuple[str, ...]:
    """Formats of ``to`` that the finished run in ``out`` has no fused file of.

    A file that its report does not list is another run's. Reports of older versions list none: then it is fused.onnx.
    """
    own = {file.name for file in report.fused} or {FUSED["onnx"]}
    return tuple(name for name in to if FUSED[name] not in own or not (out / FUSED[name]).is_file())


def add_formats(
    artifact: Path, out: Path, manifest: Manifest, report: FinetuneReport, to: Sequence[str]
) -> FinetuneReport:
    """Make what is missing from the adapter of a finished run; its report, with the new files in it, is written anew.

    Raises AdapterError if the adapter file is not one of this artifact any more, and what `patch.fuse` raises.
    """
    trained = load_adapter(out / ADAPTER, most=most_bytes(manifest))
    problems = adapter_problems(manifest, trained.tensors, trained.metadata)
    if problems:
        raise AdapterError(listed(f"{out / ADAPTER} is not the adapter of this run; restart (--restart):", problems))
    made = write_fused(artifact, out, trained.tensors, to)
    kept = tuple(file for file in report.fused if file.name not in {new.name for new in made})
    report = dataclasses.replace(report, fused=(*kept, *made))
    write_report(out, report)
    log.info("%s holds this run's adapter; made from it: %s", out, ", ".join(new.name for new in made))
    return report


def remove_others(out: Path, to: Sequence[str]) -> None:
    """Remove fused files of formats that are not asked for: an earlier run's, which the new adapter does not fit.

    Raises OutputError.
    """
    for name in set(FUSED) - set(to):
        try:
            (out / FUSED[name]).unlink(missing_ok=True)
        except OSError as err:
            raise OutputError(f"{out / FUSED[name]}, left by another run, cannot be removed: {err.strerror}") from err


def _fused(artifact: Path, target: Path, state: Mapping[str, npt.NDArray[Any]], base: str) -> FusedFile:
    made = fuse(artifact, target, state, base=base)
    if made.overflowed:
        log.warning("%s: %d weights are too large for float16, the largest one is stored", target, made.overflowed)
    if made.saturated:
        log.warning("%s: biases that do not fit into 32 bits were cut off: %s", target, ", ".join(made.saturated))
    return FusedFile(
        name=target.name,
        nbytes=target.stat().st_size,
        seconds=made.seconds,
        compute_seconds=made.compute_seconds,
        overflowed=made.overflowed,
        saturated=made.saturated,
    )
