"""store.json: which artifact a store of domains belongs to, and which domain is in use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

from lorac_runtime.errors import StoreError, listed
from lorac_runtime.files import atomic_write, size_of
from lorac_runtime.manifest import BASE, Manifest
from lorac_runtime.schema import decode

RECORD = "store.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 20  # a larger file is not read
_MEND = "remove it and make the store anew in the same folder (create --artifact): the domains are kept"


@dataclasses.dataclass(frozen=True)
class Current:
    """The domain whose files an app uses: those in the folder ``out``, of the formats ``to``.

    ``adapter`` is the sha256 of the adapter file that they were made from, empty for the base. While ``complete`` is
    False files are being put in place; where it stays so, that was cut off, and switching again finishes it.
    """

    name: str
    adapter: str
    out: str
    to: tuple[str, ...]
    complete: bool


@dataclasses.dataclass(frozen=True)
class Record:
    """store.json. ``artifact`` is a path, relative to the store where it is not absolute."""

    schema_version: int
    artifact: str
    base_sha256: str
    current: Current | None = None


def read_record(folder: Path) -> Record:
    """What store.json in ``folder`` says. Raises StoreError if it is missing or damaged."""
    path, problems = folder / RECORD, list[str]()
    try:
        size_of(path, MAX_BYTES)
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StoreError(f"{folder} is no store of domains ({RECORD} is missing); make one: create --artifact") from err
    except (OSError, ValueError, RecursionError) as err:
        raise StoreError(f"{path} cannot be read: {err}; {_MEND}") from err
    record = decode(Record, raw, "", problems)
    if not problems and record.schema_version != SCHEMA_VERSION:
        problems.append(f"schema_version: {record.schema_version}, this program reads {SCHEMA_VERSION}")
    if problems:
        raise StoreError(listed(f"{path} is damaged, {_MEND}:", problems))
    return cast(Record, record)


def write_record(folder: Path, record: Record) -> None:
    """Write store.json atomically. Raises OutputError."""
    text = json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True) + "\n"
    atomic_write(folder / RECORD, text.encode())


def require_base(folder: Path, record: Record, artifact: Path, manifest: Manifest) -> None:
    """Raise StoreError if the store was made for another base than the artifact's."""
    if manifest.files[BASE].sha256 != record.base_sha256:
        raise StoreError(
            f"{folder} belongs to another base than that of {artifact}: its {BASE} has the sha256 "
            f"{record.base_sha256[:12]}..., this one {manifest.files[BASE].sha256[:12]}...; make another store for it"
        )


def place_of(artifact: Path, folder: Path) -> str:
    """The path that the store keeps: relative where one lies beside the other, since both may be moved together."""
    place, home = artifact.resolve(), folder.resolve()
    return str(Path("..") / place.name) if place.parent == home.parent else str(place)
