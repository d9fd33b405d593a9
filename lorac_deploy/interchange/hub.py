"""Snapshots of a model hub as Hugging Face's tools keep them on a disk: found, checked and written without a network.

A repository lies in the cache as ``models--ORG--NAME``: ``blobs`` holds contents under their hashes (SHA-256 of what
Git keeps in large-file storage, the hash of a Git blob otherwise), ``snapshots/REVISION`` the names, as links to
them, and ``refs/main`` the revision in use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorac_deploy.interchange.folders import Folder, Shared, hashes
from lorac_runtime.errors import AdapterError, OutputError, listed
from lorac_runtime.files import atomic_write, output_folder
from lorac_runtime.manifest import sha256

SCHEME = "hub:"
LARGE = (".safetensors", ".onnx", ".onnx_adapter", ".bin", ".pt")  # large-file storage, whatever their size
_MOST_SMALL = 10 << 20


@dataclasses.dataclass(frozen=True)
class Repository:
    """``ORG/NAME`` at a revision, in the cache folder ``cache`` (None: where Hugging Face's tools keep theirs).

    Raises ValueError for a name that is none.
    """

    name: str
    revision: str = "main"
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.name) or ".." in self.name:
            raise ValueError(f"{self.name!r} is no name of a repository: expected ORG/NAME")

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return (self.cache or default_cache()) / f"models--{self.name.replace('/', '--')}"


def parse(text: str, cache: Path | None = None) -> Repository:
    """``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``.

    >>> parse("hub:me/net@v2").revision
    'v2'

    Raises ValueError for anything else.
    """
    name, _, revision = text.removeprefix(SCHEME).partition("@")
    return Repository(name, revision or "main", cache)


def local_source(text: str, cache: Path | None = None) -> Path:
    """What a user named: ``hub:ORG/NAME[@REVISION]``, a repository's folder in a cache, or any other path.

    Snapshots are checked. Raises ValueError for a name that is none; AdapterError for what is missing or damaged.
    """
    if text.startswith(SCHEME):
        return find_snapshot(parse(text, cache))
    path = Path(text)
    if (path / "snapshots").is_dir() and (path / "refs").is_dir():
        path = path / "snapshots" / _main_of(path)
    if path.is_dir() and path.parent.name == "snapshots":
        check_snapshot(path)
    return path


def _main_of(repository: Path) -> str:
    try:
        return (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as err:
        found = ", ".join(sorted(path.name for path in (repository / "snapshots").iterdir())) or "none"
        raise AdapterError(
            f"{repository} has no revision main: name a folder below its snapshots ({found}), or download it again"
        ) from err


def default_cache() -> Path:
    """The folder that Hugging Face's tools use (HF_HUB_CACHE, HF_HOME). Raises AdapterError if they are missing."""
    return Path(_library().constants.HF_HUB_CACHE)


def find_snapshot(repository: Repository) -> Path:
    """The folder of a snapshot that is on this machine, every file of it checked; nothing is fetched.

    Raises AdapterError naming what is missing or damaged.
    """
    hub = _library()
    try:
        found = hub.snapshot_download(
            repository.name, revision=repository.revision, cache_dir=repository.cache, local_files_only=True
        )
    except (hub.errors.LocalEntryNotFoundError, OSError, ValueError) as err:
        raise AdapterError(
            f"{repository.name} at {repository.revision!r} is not whole in {repository.cache or default_cache()}: "
            f"download it first, with a network (hf download {repository.name})"
        ) from err
    check_snapshot(Path(found))
    return Path(found)


def check_snapshot(folder: Path) -> None:
    """Compare every file that is a link into ``blobs`` with the hash that names it; other files have none.

    Raises AdapterError listing those that are missing or damaged.
    """
    problems = [f"{path.relative_to(folder)} {why}" for path in sorted(folder.rglob("*")) if (why := _problem(path))]
    parts = sorted(path.name for path in (folder.parent.parent / "blobs").glob("*.incomplete"))
    if problems and parts:
        problems.append(f"{len(parts)} downloads were not finished: {', '.join(parts[:3])}")
    if problems:
        raise AdapterError(listed(f"{folder} is a snapshot that is not whole; download it again:", problems))


def _problem(path: Path) -> str:
    if not path.exists():
        return "is a link to a blob that is missing"
    digest = path.resolve().name
    if not path.is_symlink() or path.resolve().parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40,64}", digest):
        return ""
    found = sha256(path) if len(digest) == 64 else git_hash(path.read_bytes())
    return "" if found == digest else f"was altered or cut off: its hash is {found[:12]}..., not {digest[:12]}..."


def write_snapshot(folder: Folder, repository: Repository) -> Shared:
    """Put the files into the cache as a new revision and point ``main`` at it; older revisions stay.

    The reference is written last: until then tools find what was there before. Raises OutputError.
    """
    names = {name: blob_name(name, content) for name, content in folder.files.items()}
    place = repository.folder
    snapshot = place / "snapshots" / _revision(names)
    for part in (place / "blobs", place / "refs", snapshot):
        output_folder(part)
    for name, content in folder.files.items():
        atomic_write(place / "blobs" / names[name], content)
        _link(snapshot / name, Path("..", "..", "blobs", names[name]), content)
    atomic_write(place / "refs" / repository.revision, snapshot.name.encode())
    return Shared(snapshot, hashes(folder.files), folder.fits)


def blob_name(name: str, content: bytes) -> str:
    """The hash under which the hub keeps a file.

    >>> blob_name("README.md", b"what is up, doc?")
    'bd9dbf5aae1a3862dd1526723246b20206e5fc37'
    """
    large = name.endswith(LARGE) or len(content) > _MOST_SMALL
    return hashlib.sha256(content).hexdigest() if large else git_hash(content)


def git_hash(content: bytes) -> str:
    """SHA-1 of a Git blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _revision(names: Mapping[str, str]) -> str:
    """Forty hexadecimal digits, as of a commit; the same files give the same."""
    listing = "".join(f"{digest} {name}\n" for name, digest in sorted(names.items()))
    return hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()


def _link(path: Path, target: Path, content: bytes) -> None:
    """A link, or a copy where the system allows no links, as the hub's own tools do."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        part.symlink_to(target)
        part.replace(path)
    except NotImplementedError:
        atomic_write(path, content)
    except OSError as err:
        if os.name != "nt":
            raise OutputError(f"{path} cannot be linked: {err.strerror}") from err
        atomic_write(path, content)


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as err:
        raise AdapterError('hub: needs huggingface-hub: pip install "lorac-deploy[hub]"') from err
    return huggingface_hub
