"""An unfinished run on disk: OUT/checkpoint/, written after every epoch, removed when the run is finished.

The engine's state lies in a folder per epoch. Renaming resume.json into place is what makes the new one valid, and
only then the old one goes: killed at any point, a run finds the previous checkpoint or the new one, whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import cast

from lorac_runtime.engines import Engine
from lorac_runtime.errors import CheckpointError, EngineError, OutputError, listed
from lorac_runtime.files import atomic_write, flush_folder
from lorac_runtime.manifest import FileEntry, sha256
from lorac_runtime.outputs import remove_partial_files
from lorac_runtime.schema import decode
from lorac_runtime.training import History

FOLDER = "checkpoint"
FILE_NAME = "resume.json"
SCHEMA = 2
ADVICE = "Begin anew (--restart) or choose another output folder"

log = logging.getLogger(__name__)
Run = dict[str, str]  # what a run is made of, as text: hashes of artifact, data and adapter, and its settings


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of resume.json; ``files`` lie in the folder of ``history.epoch``, ``engine`` wrote them."""

    schema: int
    engine: str
    run: dict[str, str]
    history: History
    files: dict[str, FileEntry]


def exists(out: Path) -> bool:
    """Whether ``out`` holds an unfinished run."""
    return (out / FOLDER / FILE_NAME).exists()


def save(out: Path, engine: Engine, run: Run, *, history: History) -> None:
    """Write the state after ``history.epoch`` epochs, then drop the checkpoint before it. Raises OutputError."""
    folder = _folder(out, history)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it wrote
        folder.mkdir(parents=True)
        engine.save(folder)
        files = {path.name: _flushed(path) for path in folder.iterdir()}
        flush_folder(folder)
        flush_folder(folder.parent)
    except (OSError, EngineError) as err:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(f"a checkpoint could not be written: {err}. Is there enough space in {out}?") from err
    content = dataclasses.asdict(Checkpoint(SCHEMA, engine.name, run, history, files))
    atomic_write(out / FOLDER / FILE_NAME, json.dumps(content, allow_nan=False).encode())
    for other in (out / FOLDER).glob("epoch-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def load(out: Path, engine: Engine, run: Run) -> History | None:
    """Set the engine to where the unfinished run in ``out`` stopped; None if there is none.

    Another engine may have written it: the format is the same, and results agree to rounding.

    Raises CheckpointError if the run is another one (every difference is listed) or its files are damaged.
    """
    if not exists(out):
        return None
    checkpoint = _read(out / FOLDER / FILE_NAME)
    if checkpoint.run != run:
        headline = f"{out} holds an unfinished run of another kind. {ADVICE}; what differs:"
        raise CheckpointError(listed(headline, differences(checkpoint.run, run)))
    folder = _folder(out, checkpoint.history)
    damaged = [name for name, entry in checkpoint.files.items() if not _is_whole(folder / name, entry)]
    if damaged:
        raise CheckpointError(f"{folder} is damaged ({', '.join(damaged)}). {ADVICE}")
    try:
        engine.restore(folder)
    except CheckpointError as err:
        raise CheckpointError(f"{err}. {ADVICE}") from err
    if checkpoint.engine != engine.name:
        log.info("the engine %s goes on from a checkpoint of %s", engine.name, checkpoint.engine)
    return checkpoint.history


def discard(out: Path) -> None:
    """Remove the unfinished run from ``out``, if there is one, and nothing else. Raises OutputError."""
    folder = out / FOLDER
    try:
        (folder / FILE_NAME).unlink(missing_ok=True)  # first: without it the rest counts for nothing
        for state in folder.glob("epoch-*"):
            shutil.rmtree(state)
        remove_partial_files(folder, (FILE_NAME,))
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as err:
        raise OutputError(f"cannot remove {folder}: {err}") from err


def differences(before: Run, now: Run) -> list[str]:
    """A line for each entry that differs.

    >>> differences({"epochs": "5", "data": "a9"}, {"epochs": "10", "data": "a9"})
    ["epochs: '5' before, '10' now"]
    """
    names = sorted(before.keys() | now.keys())
    return [f"{n}: {before.get(n)!r} before, {now.get(n)!r} now" for n in names if before.get(n) != now.get(n)]


def _folder(out: Path, history: History) -> Path:
    return out / FOLDER / f"epoch-{history.epoch}"


def _read(path: Path) -> Checkpoint:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read ({err}). {ADVICE}") from err
    problems: list[str] = []
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        problems.append(f"schema: {schema!r}, this runtime reads {SCHEMA}")
    checkpoint = decode(Checkpoint, raw, "", problems)
    if problems:
        raise CheckpointError(listed(f"{path} is not a checkpoint of this runtime. {ADVICE}:", problems))
    return cast(Checkpoint, checkpoint)


def _flushed(path: Path) -> FileEntry:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return FileEntry(sha256(path), path.stat().st_size)


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.nbytes and sha256(path) == entry.sha256
