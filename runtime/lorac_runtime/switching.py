"""From a domain to the files that an app uses: base.onnx and base.tflite with the domain's adapter fused into them.

New files are made beside the old ones and renamed when all are there. store.json says beforehand which domain is about
to come, and afterwards that it came: if the power is cut between two renames, that shows, and switching again mends it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorac_runtime import domains as ds
from lorac_runtime.base_file import write_copy
from lorac_runtime.config import FORMATS
from lorac_runtime.domain_record import Current
from lorac_runtime.domains import Store
from lorac_runtime.errors import OutputError, StoreError
from lorac_runtime.files import flush_folder, output_folder
from lorac_runtime.fused_files import remove_others, write_fused
from lorac_runtime.manifest import FILE_NAME, verify_files
from lorac_runtime.outputs import FUSED
from lorac_runtime.patch import check_base
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import FusedFile

STAGE = ".switching"  # inside of the output folder; what is found there was left by a power cut


def switch(store: Store, name: str, out: Path, to: Sequence[str] = ("onnx",)) -> tuple[Store, tuple[FusedFile, ...]]:
    """Put the files of a domain, or of the base, into ``out``, in place of another's, and record it as current.

    ``out`` gets fused.onnx, fused.tflite, as ``to`` says; the file of a format that is not asked for is removed, since
    it would be another domain's. Under the name ``base`` they are the base's own bytes. Returns the store as it is now.

    Raises ValueError for unknown formats, StoreError if there is no such domain, ArtifactError, AdapterError or
    OutputError; then ``out`` is as before, unless the system failed between two renames.
    """
    current = Current(name, ds.adapter_hash(store, name), str(out.resolve()), tuple(to), complete=False)
    with _staged(store, name, out, to) as (stage, made):
        store = ds.remember(store, current)
        _into_place(stage, out, to)
    return ds.remember(store, Current(name, current.adapter, current.out, current.to, complete=True)), made


def fuse_domain(store: Store, name: str, out: Path, to: Sequence[str] = ("onnx",)) -> tuple[FusedFile, ...]:
    """The files of a domain in ``out``, without making it the current one. Raises what `switch` raises.

    Raises StoreError also where ``out`` holds the files of the current domain.
    """
    current = store.record.current
    if current is not None and Path(current.out) == out.resolve():
        raise StoreError(
            f"{out} holds the files of the domain in use, {current.name}; switch, or choose another folder"
        )
    with _staged(store, name, out, to) as (stage, made):
        _into_place(stage, out, to)
    return made


def check_formats(to: Sequence[str]) -> None:
    """Raise ValueError unless ``to`` names formats of fused files, each once."""
    if not to or len(set(to)) != len(to) or not set(to) <= set(FORMATS):
        raise ValueError(f"formats {', '.join(to)!r}: expected one or more of {', '.join(FORMATS)}, each once")


@contextlib.contextmanager
def _staged(store: Store, name: str, out: Path, to: Sequence[str]) -> Iterator[tuple[Path, tuple[FusedFile, ...]]]:
    """A folder inside of ``out`` with the new files; it is gone afterwards."""
    _check(store, out, to)
    state = None if name == ds.BASE_DOMAIN else ds.state_of(store, name)
    stage = out / STAGE
    shutil.rmtree(stage, ignore_errors=True)  # what a power cut left takes room
    try:
        output_folder(stage)
        _require_room(store, out, to)
        yield stage, _base_files(store, stage, to) if state is None else write_fused(store.artifact, stage, state, to)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check(store: Store, out: Path, to: Sequence[str]) -> None:
    """Everything that can be asked before anything is made."""
    check_formats(to)
    for name in to:
        check_base(store.artifact, store.manifest, FORMATS[name])
    inside = (store.artifact, "the training artifact"), (store.folder / ds.FOLDER, "the adapters of the store")
    for folder, what in inside:
        if out.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{out} lies in the folder of {what}; choose another output folder")
    for name, what in ((FILE_NAME, "a training artifact"), (REPORT, "the output of a fine-tuning run")):
        if (out / name).exists():
            raise OutputError(f"{out} is {what} ({name}), whose files would change; choose another output folder")


def _require_room(store: Store, out: Path, to: Sequence[str]) -> None:
    needed, free = sum(store.manifest.files[FORMATS[name]].nbytes for name in to), shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"{out} has {free / 1e6:.0f} MB of free space, the new files need {needed / 1e6:.0f} MB beside the old. "
            "Free some space or choose another output folder"
        )


def _base_files(store: Store, stage: Path, to: Sequence[str]) -> tuple[FusedFile, ...]:
    """Copies of the base files."""
    verify_files(store.artifact, store.manifest, tuple(FORMATS[name] for name in to))
    made = []
    for name in to:
        started, target = time.perf_counter(), stage / FUSED[name]
        write_copy(store.artifact / FORMATS[name], target, (), {})
        made.append(FusedFile(target.name, target.stat().st_size, time.perf_counter() - started, 0.0))
    return tuple(made)


def _into_place(stage: Path, out: Path, to: Sequence[str]) -> None:
    for name in to:
        try:
            (stage / FUSED[name]).replace(out / FUSED[name])
        except OSError as err:
            raise OutputError(f"{out / FUSED[name]} cannot be replaced: {err.strerror}; switch again") from err
    remove_others(out, to)
    flush_folder(out)
