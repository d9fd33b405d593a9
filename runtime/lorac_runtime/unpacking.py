"""The artifact that lies in a bundle, as files: onnxruntime opens the base by its path."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from lorac_runtime.errors import ArtifactError, OutputError
from lorac_runtime.files import flush_folder, locked, output_folder
from lorac_runtime.manifest import FILE_NAME, Manifest, load, parse, verify_files
from lorac_runtime.trust import SIGNATURE

ARTIFACT = "artifact"  # the folder in the archive
HOME = ".artifacts"  # the folder in the output folder
_DAMAGED = (zipfile.BadZipFile, EOFError, KeyError, ValueError)  # what the library raises where a member is not whole
_ENCRYPTED = 1  # of a member's flags


def unpacked(archive: Path, out: Path) -> Path:
    """The folder of the archive's artifact, unpacked into ``out`` where it is not there yet; others are removed.

    Raises ArtifactError if it is damaged, OutputError if it cannot be written, BusyError.
    """
    try:
        with zipfile.ZipFile(archive) as bundle, locked(output_folder(out)):
            _require_stored(bundle)
            text = bundle.read(f"{ARTIFACT}/{FILE_NAME}").decode()
            manifest = parse(text, f"{archive}/{ARTIFACT}/{FILE_NAME}")
            return _current(bundle, manifest, text, out / HOME)
    except _DAMAGED as err:
        raise ArtifactError(f"{archive} is damaged ({err}); copy it again") from err


def _require_stored(bundle: zipfile.ZipFile) -> None:
    """Raise BadZipFile unless the files of the artifact lie there as they are, which is how they were written."""
    for entry in bundle.infolist():
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & _ENCRYPTED
        if entry.filename.startswith(f"{ARTIFACT}/") and not stored:
            raise zipfile.BadZipFile(f"{entry.filename} is packed in another way")


def _current(bundle: zipfile.ZipFile, manifest: Manifest, text: str, home: Path) -> Path:
    target = home / _name(text)
    try:
        verify_files(target, load(target))
    except ArtifactError:
        _unpack(bundle, manifest, text, target)
    for other in home.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def _unpack(bundle: zipfile.ZipFile, manifest: Manifest, text: str, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        for left in (part, target):
            if left.exists():
                shutil.rmtree(left)
        part.mkdir(parents=True)
        (part / FILE_NAME).write_text(text, encoding="utf-8")
        signed = [SIGNATURE] if f"{ARTIFACT}/{SIGNATURE}" in bundle.namelist() else []
        for name in (*signed, *manifest.files):
            with bundle.open(f"{ARTIFACT}/{name}") as source, (part / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        _flush(part)
        verify_files(part, manifest)
        part.rename(target)
        flush_folder(target.parent)
    except OSError as err:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(f"the artifact cannot be unpacked to {target}: {err.strerror or err}") from err


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    flush_folder(folder)


def _name(manifest: str) -> str:
    """A name of its own for every artifact, from the text of its manifest."""
    return hashlib.sha256(manifest.encode()).hexdigest()[:16]
