"""The output folder: can it be written, has it room, does it harm an input, what did a killed run leave there?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lorac_runtime.config import FORMATS
from lorac_runtime.errors import OutputError
from lorac_runtime.files import output_folder
from lorac_runtime.manifest import ADAPTER, FILE_NAME, Manifest

FUSED = {name: f"fused.{name}" for name in FORMATS}  # by format


def check_outputs(
    artifact: Path,
    out: Path,
    manifest: Manifest,
    *,
    data: Path,
    adapter: Path | None,
    to: Sequence[str] = ("onnx",),
) -> None:
    """Create ``out`` and make sure that a run of this artifact can write there, with fused files of the formats ``to``.

    Raises OutputError as `check_place` does, and if ``out`` would overwrite the adapter that the run starts from,
    cannot be written, or has too little room.
    """
    check_place(artifact, out, data)
    if adapter is not None and (out / ADAPTER).resolve() == adapter.resolve():
        raise OutputError(f"{out / ADAPTER} would overwrite the adapter it starts from; choose another output folder")
    output_folder(out)
    needed, free = space_needed(manifest, to), shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"{out} has {free / 1e6:.0f} MB of free space, a run needs up to {needed / 1e6:.0f} MB. "
            "Free some space or choose another output folder"
        )


def check_place(artifact: Path, out: Path, data: Path) -> None:
    """Raise OutputError if ``out`` lies in the artifact or in a folder of images, or is an artifact itself."""
    for source, what in ((artifact, "the training artifact"), (data, "the folder of images")):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{out} lies in {what} {source}, which is never modified; choose another output folder")
    if (out / FILE_NAME).exists():
        raise OutputError(f"{out} is a training artifact itself; choose another output folder")


def space_needed(manifest: Manifest, to: Sequence[str] = ("onnx",)) -> int:
    """Bytes that a run holds on disk at most: two checkpoints, an adapter and fused models, each beside an old one.

    A checkpoint is the engine's own files with the optimizer's memory, two values for each trained one.
    """
    trained = 4 * manifest.trained_parameters
    engine_files = max(sum(manifest.files[f].nbytes for f in e.files) for e in manifest.engines.values())
    return 2 * (engine_files + 3 * trained) + sum(manifest.files[FORMATS[f]].nbytes for f in to) + 2 * trained


def remove_partial_files(folder: Path, names: Sequence[str]) -> None:
    """Remove what processes left that were killed while they wrote one of ``names`` (see `files.staged`)."""
    for name in names:
        for part in folder.glob(f".{name}.*.part"):
            part.unlink(missing_ok=True)
