"""Domains: one base, and a small adapter file for each condition it has to work in (day, night, camera 1 ...).

A store is a folder that belongs to one training artifact::

    STORE/store.json                  the artifact, the hash of its base, which domain is in use and where
    STORE/domains/NAME.safetensors    an adapter file for each domain

Nothing but files says what is there, and each appears whole or not at all, so a store can be used after a power cut at
any moment. Two processes must not change one store at a time.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.adapter import load_adapter, most_bytes, to_manifest_coordinates
from lorac_runtime.domain_record import (
    RECORD,
    SCHEMA_VERSION,
    Current,
    Record,
    place_of,
    read_record,
    require_base,
    write_record,
)
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError, StoreError, listed
from lorac_runtime.expected import state_problems
from lorac_runtime.files import atomic_write, flush_folder, size_of
from lorac_runtime.manifest import BASE, Manifest, load, sha256
from lorac_runtime.outputs import remove_partial_files
from lorac_runtime.patch import batchnorm_tensors

FOLDER, SUFFIX = "domains", ".safetensors"
BASE_DOMAIN = "base"  # the model without any adapter
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Store:
    """A store that was opened: its folder, its artifact, what store.json says."""

    folder: Path
    artifact: Path
    manifest: Manifest
    record: Record


@dataclasses.dataclass(frozen=True)
class Domain:
    """A domain of a store. ``parameters`` counts trained numbers; the base has no file of its own and none of them.

    ``outdated``: it is in use, but its adapter was replaced since. ``problem``: why it cannot be used, empty if it can.
    """

    name: str
    nbytes: int
    method: str
    parameters: int
    current: bool
    outdated: bool = False
    problem: str = ""


def check_name(name: str) -> str:
    """``name`` itself, if a domain may be called so.

    >>> check_name("camera-1")
    'camera-1'

    Raises ValueError for one that could be no file name everywhere, or leave the store's folder.
    """
    if _NAME.fullmatch(name) is None or name.endswith("."):
        raise ValueError(
            f"{name!r} cannot be the name of a domain: use 1 to 64 letters, digits, '-', '_' and '.', a letter or "
            "digit first and no '.' at the end"
        )
    return name


def create(folder: Path, artifact: Path) -> Store:
    """Make a store for the artifact; one that is there already, with the same base, is told where the artifact lies.

    Raises ArtifactError for a damaged artifact, StoreError if the store belongs to another base, OutputError if it
    cannot be written.
    """
    manifest, current = load(artifact), None
    if (folder / RECORD).exists():
        before = read_record(folder)
        require_base(folder, before, artifact, manifest)
        current = before.current
    if folder.resolve().is_relative_to(artifact.resolve()):
        raise OutputError(f"{folder} lies in the training artifact {artifact}, which is never modified; choose another")
    _home(folder)
    record = Record(SCHEMA_VERSION, place_of(artifact, folder), manifest.files[BASE].sha256, current)
    write_record(folder, record)
    return Store(folder, artifact, manifest, record)


def open_store(folder: Path) -> Store:
    """The store in ``folder``.

    Raises StoreError if there is none, it is damaged, or its artifact has another base by now; ArtifactError.
    """
    record = read_record(folder)
    artifact = Path(os.path.normpath(folder.resolve() / record.artifact))
    try:
        manifest = load(artifact)
    except ArtifactError as err:
        raise ArtifactError(f"{err}. If it was moved, tell the store {folder} where it is: create --artifact") from err
    require_base(folder, record, artifact, manifest)
    return Store(folder, artifact, manifest, record)


def domains(store: Store) -> tuple[Domain, ...]:
    """Every domain, the base first, the others by name; damaged ones with what is wrong."""
    current = store.record.current
    base = Domain(BASE_DOMAIN, 0, "", 0, current is not None and current.name == BASE_DOMAIN)
    return (base, *(_domain(store, path) for path in _files(store.folder)))


def add(store: Store, name: str, adapter: Path, *, replace: bool = False) -> Domain:
    """Keep a copy of an adapter file as the domain ``name``, once it is known to fit.

    With ``replace`` it may take the place of an adapter of that name. If anything is raised the store is as before.

    Raises ValueError for a bad name, StoreError for one that is taken (also in other letters' case), AdapterError for
    an adapter that does not fit the artifact, OutputError.
    """
    _require_free(store, check_name(name), replace=replace)
    content = _adapter_bytes(store, adapter)
    _fitting(store, adapter)
    home = _home(store.folder)
    remove_partial_files(home, [name + SUFFIX])
    atomic_write(home / (name + SUFFIX), content)
    return _domain(store, home / (name + SUFFIX))


def delete(store: Store, name: str, *, force: bool = False) -> None:
    """Remove a domain; files that were made from it stay where they are.

    Raises StoreError if there is none, or it is in use and ``force`` is not given; OutputError.
    """
    path = _path(store, name)
    current = store.record.current
    if current is not None and current.name == name:
        if not force:
            raise StoreError(
                f"{name} is in use: its files lie in {current.out}. Switch to another domain, or use force"
            )
        write_record(store.folder, dataclasses.replace(store.record, current=None))
    try:
        path.unlink()
    except OSError as err:
        raise OutputError(f"{path} cannot be removed: {err.strerror}") from err
    flush_folder(path.parent)


def state_of(store: Store, name: str) -> Tensors:
    """The tensors of a domain in the artifact's coordinates.

    Raises StoreError if there is no such domain, AdapterError if its file is damaged or does not fit.
    """
    return _fitting(store, _path(store, name))


def adapter_hash(store: Store, name: str) -> str:
    """The sha256 of a domain's adapter file; empty for the base."""
    return "" if name == BASE_DOMAIN else sha256(_path(store, name))


def remember(store: Store, current: Current | None) -> Store:
    """Write down which domain is in use. Raises OutputError."""
    record = dataclasses.replace(store.record, current=current)
    write_record(store.folder, record)
    return dataclasses.replace(store, record=record)


def _home(folder: Path) -> Path:
    """The folder of adapter files, made where it is missing."""
    home = folder / FOLDER
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(f"{home} cannot be made: {err.strerror or err}") from err
    return home


def _files(folder: Path) -> list[Path]:
    """Adapter files of domains; others that lie there are none."""
    found = [path for path in (folder / FOLDER).glob("*" + SUFFIX) if _NAME.fullmatch(path.name[: -len(SUFFIX)])]
    return sorted(found, key=lambda path: path.name.lower())


def _domain(store: Store, path: Path) -> Domain:
    name, current = path.name[: -len(SUFFIX)], store.record.current
    used = current is not None and current.name == name
    method, parameters, problem = "", 0, ""
    try:
        file = load_adapter(path, most=most_bytes(store.manifest))
        method = file.metadata.get("method", "")
        trained = {t.name for t in store.manifest.trainables}
        parameters = sum(value.size for key, value in file.tensors.items() if key in trained)
        _fitting(store, path)
    except AdapterError as err:
        problem = str(err)
    outdated = current is not None and used and current.adapter != sha256(path)
    return Domain(name, path.stat().st_size, method, parameters, used, outdated, problem)


def _path(store: Store, name: str) -> Path:
    """The adapter file of a domain. Raises StoreError if there is none."""
    known = {path.name[: -len(SUFFIX)]: path for path in _files(store.folder)}
    if name not in known:
        there = ", ".join([BASE_DOMAIN, *known])
        if name == BASE_DOMAIN:
            raise StoreError(f"{BASE_DOMAIN} is the model without any adapter; it has no file, and stays")
        raise StoreError(f"{store.folder} has no domain {name!r}; there are {there}")
    return known[name]


def _require_free(store: Store, name: str, *, replace: bool) -> None:
    if name.lower() == BASE_DOMAIN:
        raise StoreError(f"{name} is taken: {BASE_DOMAIN} means the model without any adapter; choose another name")
    alike = [path.name[: -len(SUFFIX)] for path in _files(store.folder)]
    taken = [other for other in alike if other.lower() == name.lower() and not (replace and other == name)]
    if taken:
        advice = "replace it" if taken[0] == name else "names that differ in case alone are one on some systems"
        raise StoreError(f"{name} is taken by the domain {taken[0]}: choose another name ({advice})")


def _adapter_bytes(store: Store, path: Path) -> bytes:
    try:
        size_of(path, most_bytes(store.manifest))
        return path.read_bytes()
    except OSError as err:
        raise AdapterError(f"{path} cannot be read: {err.strerror or err}") from err


def _fitting(store: Store, path: Path) -> Tensors:
    """The tensors of an adapter file in the artifact's coordinates. Raises AdapterError if it does not fit."""
    norms = batchnorm_tensors(store.artifact, store.manifest)
    with np.errstate(over="ignore"):  # what becomes infinite is told below
        state = to_manifest_coordinates(store.manifest, norms, load_adapter(path, most=most_bytes(store.manifest)))
    problems = state_problems(store.manifest, state)
    if problems:
        raise AdapterError(listed(f"{path} does not fit the artifact of {store.manifest.model!r}:", problems))
    return state
