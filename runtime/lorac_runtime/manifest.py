"""manifest.json: what a training artifact holds, and the check that it holds it.

An artifact is a folder. The manifest names every file with its sha256, every tensor that may change and the
byte range where it lies in the base file (the patch table), the input's preprocessing, and the defaults of
training. Reading collects every mismatch and reports them together.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

from lorac_runtime.description import (
    BASE,
    BASE_TFLITE,
    BN_POLICIES,
    LOSSES,
    OPTIMIZERS,
    ROLES,
    Adapter,
    BatchNorm,
    BnPolicy,
    EngineEntry,
    Feature,
    InputSpec,
    Manifest,
    MemoryNeed,
    OutputSpec,
    Partial,
    Trainable,
    TrainingDefaults,
)
from lorac_runtime.errors import ArtifactError, listed
from lorac_runtime.files import size_of
from lorac_runtime.manifest_checks import contradictions
from lorac_runtime.places import TFLITE_WEIGHTS, ByteRange, FileEntry, Patch, Quantized, TfliteEntry
from lorac_runtime.schema import decode

__all__ = [
    "ADAPTER",
    "ANCHORS",
    "BASE",
    "BASE_TFLITE",
    "BATCHNORM",
    "BN_POLICIES",
    "FILE_NAME",
    "LOSS",
    "LOSSES",
    "OPTIMIZERS",
    "ROLES",
    "SCHEMA_VERSION",
    "TFLITE_WEIGHTS",
    "Adapter",
    "BatchNorm",
    "BnPolicy",
    "ByteRange",
    "EngineEntry",
    "Feature",
    "FileEntry",
    "InputSpec",
    "Manifest",
    "MemoryNeed",
    "OutputSpec",
    "Partial",
    "Patch",
    "Quantized",
    "TfliteEntry",
    "Trainable",
    "TrainingDefaults",
    "load",
    "parse",
    "sha256",
    "verify_files",
]

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
BATCHNORM = "batchnorm.safetensors"
ADAPTER = "adapter.safetensors"
LOSS = "loss.onnx"  # the loss that the maker of an artifact gave, as it was cleaned; engines do not read it
ANCHORS = "anchors.npz"  # samples with labels that no adaptation may forget; not every artifact has some
MAX_BYTES = 64 << 20  # no manifest of a CNN comes near; a larger one is not read


def parse(text: str, where: str = FILE_NAME) -> Manifest:
    """Read a manifest from JSON text.

    Raises ArtifactError naming every mismatch at once.
    """
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as err:  # ValueError: also an integer of thousands of digits
        raise ArtifactError(f"{where} is not valid JSON ({err}); export the artifact again.") from err
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where} has schema_version {version!r}, this runtime reads {SCHEMA_VERSION}: "
            "export the artifact again with the matching lorac-deploy."
        )
    problems: list[str] = []
    manifest = decode(Manifest, raw, "", problems)
    if not problems:
        problems = contradictions(manifest)
    if problems:
        raise ArtifactError(listed(f"{where} does not describe a training artifact:", problems))
    return cast(Manifest, manifest)


def load(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``; the files it names are checked by `verify_files`.

    Raises ArtifactError.
    """
    path = folder / FILE_NAME
    try:
        size_of(path, MAX_BYTES)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found: {folder} is not a training artifact folder") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path} cannot be read: {err}") from err
    return parse(text, str(path))


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest, names: tuple[str, ...] | None = None) -> None:
    """Check size and sha256 of the named files (all by default) against the manifest.

    Raises ArtifactError listing every missing or altered file.
    """
    problems = []
    for name in manifest.files if names is None else names:
        problem = _file_problem(folder / name, manifest.files[name])
        problems += [f"{name} {problem}"] if problem else []
    if problems:
        raise ArtifactError(
            listed(f"{folder} is damaged or mixed from two exports; copy or export it again:", problems)
        )


def _file_problem(path: Path, entry: FileEntry) -> str:
    try:
        if not path.is_file():
            return "is missing"
        # realpath, because Path.resolve raises on a loop of links
        if Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
            return "is a link that leads out of the folder; copy the file itself"
        if path.stat().st_size != entry.nbytes:
            return f"has {path.stat().st_size} bytes, expected {entry.nbytes}"
        if sha256(path) != entry.sha256:
            return "was altered: its sha256 is not the one in the manifest"
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    return ""
