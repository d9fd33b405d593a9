"""Generations of an adapted model in a state folder, one of which is in place; which one changes by one rename::

    STATE/generations/0000/      adapter.safetensors, fused.onnx, generation.json: the artifact's own model
    STATE/generations/0003/      one that was accepted; with report.json
    STATE/current                -> generations/0003
    STATE/adapter.safetensors    -> current/adapter.safetensors, and so for each fused file
    STATE/state.json             what the state belongs to

An app opens STATE/fused.onnx and gets the file of the current generation, whole, whenever it looks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorac_runtime.config import FORMATS
from lorac_runtime.errors import OutputError, StateError, listed
from lorac_runtime.files import atomic_write, flush_folder, size_of
from lorac_runtime.gate import Verdict
from lorac_runtime.manifest import FileEntry, sha256
from lorac_runtime.schema import decode

FOLDER, CURRENT = "generations", "current"
RECORD, ENTRY = "state.json", "generation.json"
SCHEMA = 1
MAX_BYTES = 1 << 20  # of either file; larger ones are not read
_NAME = re.compile(r"[0-9]{4,9}")
_PART = re.compile(r"\.(current|[a-z]+\.(json|safetensors|onnx|tflite))\.[0-9]+\.part")  # of a state's own files
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """state.json: the artifact that a state belongs to, and ``accepted``, the last generation that was put in place.

    ``base`` is the sha256 of the artifact's base file, ``formats`` are those of the fused files in each generation.
    """

    schema: int
    base: str
    formats: tuple[str, ...]
    accepted: int = -1


@dataclasses.dataclass(frozen=True)
class Generation:
    """generation.json: ``number`` was made from ``parent`` (None: the first), ``files`` lie beside it.

    ``run`` identifies the attempt: artifact, data, settings and what the gate asked for.
    """

    schema: int
    number: int
    parent: int | None
    files: dict[str, FileEntry]
    run: dict[str, str]
    verdict: Verdict | None = None


def is_state(folder: Path) -> bool:
    """Whether ``folder`` is a state folder."""
    return (folder / RECORD).exists()


def read_record(folder: Path) -> Record:
    """What state.json says. Raises StateError if it is missing or damaged."""
    path = folder / RECORD
    if not path.exists():
        raise StateError(f"{folder} is no state folder ({RECORD} is missing); a run with --keep-if-better makes one")
    record = read(Record, path)
    if "onnx" not in record.formats or not set(record.formats) <= set(FORMATS):
        raise StateError(f"{path} is damaged: formats are {', '.join(map(repr, record.formats))}")
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write state.json atomically. Raises OutputError."""
    atomic_write(folder / RECORD, _as_json(record))


def path_of(folder: Path, number: int) -> Path:
    """The folder of a generation.

    >>> path_of(Path("state"), 3).as_posix()
    'state/generations/0003'
    """
    return folder / FOLDER / f"{number:04}"


def numbers(folder: Path) -> list[int]:
    """The generations that are there, in ascending order."""
    home = folder / FOLDER
    found = home.iterdir() if home.is_dir() else ()
    return sorted(int(path.name) for path in found if _NAME.fullmatch(path.name) and (path / ENTRY).is_file())


def read_generation(folder: Path, number: int) -> Generation:
    """A generation whose files are whole. Raises StateError if it is missing or damaged."""
    home = path_of(folder, number)
    if not (home / ENTRY).is_file():
        there = ", ".join(map(str, numbers(folder))) or "none"
        raise StateError(f"{folder} has no generation {number}; there are {there}")
    generation = entry(home / ENTRY)
    damaged = [name for name, entry in generation.files.items() if not _is_whole(home, name, entry)]
    damaged += [ENTRY] if generation.number != number else []
    if damaged:
        raise StateError(
            f"generation {number} of {folder} is damaged ({', '.join(damaged)}); put another one in place (status, "
            "rollback --to NUMBER), or begin in another folder"
        )
    return generation


def current(folder: Path) -> int | None:
    """The number of the generation in place, None before the first. Raises StateError if the link leads elsewhere."""
    link = folder / CURRENT
    if not link.is_symlink():
        if link.exists():
            raise StateError(f"{link} is no link; it should be one to the generation in place")
        return None
    target = link.readlink()
    if target.parent != Path(FOLDER) or not _NAME.fullmatch(target.name):
        raise StateError(f"{link} leads to {target}, which is no generation")
    return int(target.name)


def describe(
    home: Path, number: int, parent: int | None, names: Sequence[str], run: dict[str, str], verdict: Verdict | None
) -> None:
    """Write generation.json for the files ``names`` in the folder ``home``, and remove others. Raises OutputError."""
    _keep_only(home, names)
    files = {name: FileEntry(sha256(home / name), (home / name).stat().st_size) for name in names}
    atomic_write(home / ENTRY, _as_json(Generation(SCHEMA, number, parent, files, run, verdict)))


def _keep_only(home: Path, names: Sequence[str]) -> None:
    """Remove what killed processes left, such as half of a checkpoint. Raises OutputError."""
    try:
        for path in home.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()
    except OSError as err:
        raise OutputError(f"{home} cannot be cleared: {err.strerror or err}") from err


def put(folder: Path, home: Path, number: int) -> None:
    """Make the folder ``home``, which holds generation.json, the generation ``number``: one rename.

    Raises OutputError.
    """
    target = path_of(folder, number)
    try:
        target.parent.mkdir(exist_ok=True)
        home.rename(target)
        for parent in (target.parent, home.parent):
            flush_folder(parent)
    except OSError as err:
        raise OutputError(f"{target} cannot be written: {err.strerror or err}") from err


def switch(folder: Path, number: int) -> None:
    """Put a generation in place: one rename of a link. Raises OutputError."""
    _link(folder / CURRENT, f"{FOLDER}/{number:04}")


def link_files(folder: Path, names: Sequence[str]) -> None:
    """Links in ``folder`` to files of the generation in place, where they are missing. Raises OutputError."""
    for name in names:
        target = f"{CURRENT}/{name}"
        if not (folder / name).is_symlink() or (folder / name).readlink().as_posix() != target:
            _link(folder / name, target)


def remove(folder: Path, number: int) -> None:
    """Remove a generation. Raises OutputError."""
    home = path_of(folder, number)
    try:
        (home / ENTRY).unlink(missing_ok=True)  # first: without it the rest is no generation
        shutil.rmtree(home)
    except FileNotFoundError:
        return
    except OSError as err:
        raise OutputError(f"{home} cannot be removed: {err.strerror or err}") from err


def ancestors(folder: Path, number: int) -> list[int]:
    """The generation and those that it was made from, newest first, as far as they are kept."""
    there, found = set(numbers(folder)), list[int]()
    while number in there and number not in found:
        found.append(number)
        parent = entry(path_of(folder, number) / ENTRY).parent
        number = -1 if parent is None else parent
    return found


def sweep(folder: Path) -> None:
    """Remove what killed processes left: folders that are no generations, files and links that were not renamed."""
    home = folder / FOLDER
    for path in home.iterdir() if home.is_dir() else ():
        if not (path / ENTRY).is_file():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _link(path: Path, target: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        part.symlink_to(target)
        part.replace(path)
        flush_folder(path.parent)
    except (OSError, NotImplementedError) as err:
        part.unlink(missing_ok=True)
        reason = getattr(err, "strerror", None) or str(err)
        raise OutputError(
            f"{path} cannot be made a link to {target}: {reason}. Generations need a file system with symbolic links"
        ) from err


def entry(path: Path) -> Generation:
    """What a generation.json says. Raises StateError if it is missing or damaged."""
    return read(Generation, path)


def read(kind: type[T], path: Path) -> T:
    """One of a state's own JSON files. Raises StateError if it is missing or damaged."""
    problems: list[str] = []
    try:
        size_of(path, MAX_BYTES)
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise StateError(f"{path} cannot be read: {err}") from err
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        problems.append(f"schema: expected {SCHEMA}")
    found: T = decode(kind, raw, "", problems)
    if problems:
        raise StateError(listed(f"{path} is damaged:", problems))
    return found


def _as_json(content: Record | Generation) -> bytes:
    return (json.dumps(dataclasses.asdict(content), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _is_whole(home: Path, name: str, entry: FileEntry) -> bool:
    path = home / name
    plain = Path(name).name == name and path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == entry.nbytes and sha256(path) == entry.sha256
