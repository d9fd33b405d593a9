"""An unfinished run on disk: OUT/checkpoint/, written while it trains, removed when the run is finished.

Each checkpoint is a folder named after the steps taken. It is written beside, flushed and renamed, so that it is there
whole or not at all; the one before it stays, for the day that a disk forgets what it was told to keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import cast

from lorac_runtime.engines import Engine
from lorac_runtime.errors import CheckpointError, EngineError, OutputError, listed
from lorac_runtime.files import atomic_write, flush_folder, size_of
from lorac_runtime.manifest import FileEntry, sha256
from lorac_runtime.schema import decode
from lorac_runtime.training import History

FOLDER = "checkpoint"
FILE_NAME = "resume.json"
SCHEMA = 3
KEPT = 2
MAX_BYTES = 256 << 20  # no history of steps comes near; a larger file is not read
ADVICE = "Begin anew (--restart) or choose another output folder"
_NAME = re.compile(r"step-([0-9]{1,12})")

log = logging.getLogger(__name__)
Run = dict[str, str]  # what a run is made of, as text: hashes of artifact, data and adapter, and its settings


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of resume.json; ``files`` lie beside it, ``engine`` wrote them, ``digest`` is that of the rest."""

    schema: int
    engine: str
    run: dict[str, str]
    history: History
    files: dict[str, FileEntry]
    digest: str = ""

    def to_json(self) -> bytes:
        """The checkpoint as text, with the right digest."""
        content = dataclasses.asdict(dataclasses.replace(self, digest=self.expected_digest()))
        return json.dumps(content, allow_nan=False).encode()

    def expected_digest(self) -> str:
        """The sha256 of all that it holds but the digest."""
        content = dataclasses.asdict(dataclasses.replace(self, digest=""))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def exists(out: Path) -> bool:
    """Whether ``out`` holds an unfinished run."""
    return bool(_newest_first(out))


def save(out: Path, engine: Engine, run: Run, *, history: History) -> None:
    """Write the state that training has reached, then drop all checkpoints but the one before it.

    Raises OutputError.
    """
    home = out / FOLDER
    target = home / f"step-{len(history.losses)}"
    part = home / f".{target.name}.{os.getpid()}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        engine.save(part)
        files = {path.name: _flushed(path) for path in part.iterdir()}
        atomic_write(part / FILE_NAME, Checkpoint(SCHEMA, engine.name, run, history, files).to_json())
        _remove(target)  # a damaged one, from which this run could not go on
        part.rename(target)
        for folder in (home, out):
            flush_folder(folder)
    except (OSError, EngineError, OutputError) as err:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(f"a checkpoint could not be written: {err}. Is there enough space in {out}?") from err
    with contextlib.suppress(OSError):  # the next one tries again
        for other in (*_newest_first(out)[KEPT:], *_parts(out)):
            _remove(other)


def load(out: Path, engine: Engine, run: Run) -> History | None:
    """Set the engine to where the unfinished run in ``out`` stopped; None if there is none.

    Where the newest checkpoint is damaged the one before it is taken, and that is logged. Another engine may have
    written it: the format is the same, and results agree to rounding.

    Raises CheckpointError if the run is another one (every difference is listed) or all checkpoints are damaged.
    """
    problems: list[str] = []
    for folder in _newest_first(out):
        try:
            checkpoint = _read(folder)
        except CheckpointError as err:
            problems.append(str(err))
            continue
        if checkpoint.run != run:
            headline = f"{out} holds an unfinished run of another kind. {ADVICE}; what differs:"
            raise CheckpointError(listed(headline, differences(checkpoint.run, run)))
        return _restored(folder, checkpoint, engine, problems)
    if problems:
        raise CheckpointError(listed(f"{out / FOLDER} is damaged. {ADVICE}:", problems))
    return None


def _restored(folder: Path, checkpoint: Checkpoint, engine: Engine, problems: list[str]) -> History:
    try:
        engine.restore(folder)
    except CheckpointError as err:
        raise CheckpointError(f"{err}. {ADVICE}") from err
    if problems:
        log.warning("%s; going on from the checkpoint before it", problems[0])
    if checkpoint.engine != engine.name:
        log.info("the engine %s goes on from a checkpoint of %s", engine.name, checkpoint.engine)
    return checkpoint.history


def discard(out: Path) -> None:
    """Remove the unfinished run from ``out``, if there is one, and nothing else. Raises OutputError."""
    home = out / FOLDER
    try:
        for folder in (*reversed(_newest_first(out)), *_parts(out)):  # cut off, it leaves the newest
            _remove(folder)
        if home.is_dir() and not any(home.iterdir()):
            home.rmdir()
    except OSError as err:
        raise OutputError(f"cannot remove {home}: {err}") from err


def progress(out: Path) -> History | None:
    """How far the unfinished run in ``out`` is; None if there is none that could go on."""
    for folder in _newest_first(out):
        try:
            return _read(folder).history
        except CheckpointError:
            continue
    return None


def differences(before: Run, now: Run) -> list[str]:
    """A line for each entry that differs.

    >>> differences({"epochs": "5", "data": "a9"}, {"epochs": "10", "data": "a9"})
    ["epochs: '5' before, '10' now"]
    """
    names = sorted(before.keys() | now.keys())
    return [f"{n}: {before.get(n)!r} before, {now.get(n)!r} now" for n in names if before.get(n) != now.get(n)]


def _newest_first(out: Path) -> list[Path]:
    """The folders of checkpoints, whole or damaged."""
    found = [(int(name[1]), path) for path in _entries(out) if (name := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if (path / FILE_NAME).exists()]


def _parts(out: Path) -> list[Path]:
    """What processes left that were killed while they wrote or removed a checkpoint."""
    parts = [path for path in _entries(out) if path.name.startswith(".step-") and path.name.endswith(".part")]
    removed = [path for path in _entries(out) if _NAME.fullmatch(path.name) and not (path / FILE_NAME).exists()]
    return parts + removed


def _entries(out: Path) -> list[Path]:
    home = out / FOLDER
    return list(home.iterdir()) if home.is_dir() and not home.is_symlink() else []


def _remove(path: Path) -> None:
    """Remove a checkpoint, or what is in its place; what is left if that is cut off is no checkpoint."""
    if path.is_dir() and not path.is_symlink():
        (path / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(folder: Path) -> Checkpoint:
    """A checkpoint that is whole. Raises CheckpointError."""
    checkpoint = _decoded(folder / FILE_NAME)
    if checkpoint.digest != checkpoint.expected_digest():
        raise CheckpointError(f"{folder / FILE_NAME} was altered")
    damaged = [name for name, entry in checkpoint.files.items() if not _is_whole(folder, name, entry)]
    if damaged:
        raise CheckpointError(f"{folder} is damaged ({', '.join(damaged)})")
    return checkpoint


def _decoded(path: Path) -> Checkpoint:
    try:
        size_of(path, MAX_BYTES)
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read ({err})") from err
    problems: list[str] = []
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        problems.append(f"schema: {schema!r}, this runtime reads {SCHEMA}")
    checkpoint = decode(Checkpoint, raw, "", problems)
    if problems:
        raise CheckpointError(listed(f"{path} is not a checkpoint of this runtime:", problems))
    return cast(Checkpoint, checkpoint)


def _flushed(path: Path) -> FileEntry:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return FileEntry(sha256(path), path.stat().st_size)


def _is_whole(folder: Path, name: str, entry: FileEntry) -> bool:
    path = folder / name
    plain = Path(name).name == name and path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == entry.nbytes and sha256(path) == entry.sha256
