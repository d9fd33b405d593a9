"""A state folder: opening it, doing what a killed process left undone, looking at it, rolling it back.

What is unfinished lies in STATE/attempt, which is an ordinary run's output folder, so a run that was killed goes on
there. It becomes a generation by one rename and is in place after another one; `recover` finds out how far it came.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

from lorac_runtime import generations as gen
from lorac_runtime import resume
from lorac_runtime.errors import OutputError, StateError
from lorac_runtime.files import atomic_write, locked
from lorac_runtime.gate import Verdict
from lorac_runtime.generations import Record
from lorac_runtime.manifest import ADAPTER, BASE, Manifest
from lorac_runtime.outputs import FUSED
from lorac_runtime.report import FILE_NAME as REPORT

ATTEMPT, REJECTED = "attempt", "rejected.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """rejected.json: the last attempt, where it was not accepted. ``run`` identifies it."""

    schema: int
    run: dict[str, str]
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Kept:
    """A generation in a `Status`; ``accuracy`` is that on the samples which were held out when it was accepted."""

    number: int
    parent: int | None
    accuracy: float | None
    nbytes: int
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Status:
    """What a state folder holds: the generation in place, those that are kept, and what is unfinished.

    ``unfinished`` is how many steps of an attempt are done, None where none is under way. ``rejected`` says why the
    last attempt was not accepted, () where it was, or where there was none.
    """

    current: int | None
    kept: tuple[Kept, ...]
    formats: tuple[str, ...]
    unfinished: int | None
    rejected: tuple[str, ...]


def open_state(folder: Path, manifest: Manifest, formats: tuple[str, ...]) -> Record:
    """The record of the state in ``folder``, made anew in one that holds nothing of a run yet.

    Raises StateError if it belongs to another base or makes other formats, OutputError if a run without generations
    wrote there.
    """
    base = manifest.files[BASE].sha256
    if not gen.is_state(folder):
        _require_empty(folder)
        record = Record(gen.SCHEMA, base, formats)
        gen.write_record(folder, record)
        return record
    record = gen.read_record(folder)
    if record.base != base:
        raise StateError(
            f"{folder} belongs to another base: its {BASE} has the sha256 {record.base[:12]}..., the artifact's "
            f"{base[:12]}...; choose another folder for this artifact"
        )
    if record.formats != formats:
        raise StateError(
            f"{folder} holds the formats {', '.join(record.formats)}, not {', '.join(formats)}: give "
            f"--to {','.join(record.formats)}, or choose another folder"
        )
    return record


def recover(folder: Path, record: Record) -> Record:
    """Do the rest of what a process left that was killed while it accepted an attempt. Raises StateError, OutputError.

    The link to the generation in place is repaired where it is missing and there is no doubt.
    """
    gen.sweep(folder)
    _finish_accepting(folder)
    there = gen.numbers(folder)
    newest = max(there, default=-1)
    if newest > record.accepted:
        record = put_in_place(folder, record, newest)
    if there and gen.current(folder) not in there:
        raise StateError(
            f"the link {folder / gen.CURRENT} is missing or leads nowhere; put one of the generations "
            f"{', '.join(map(str, there))} in place: rollback {folder} --to {newest}"
        )
    if there:
        gen.link_files(folder, names(record))
    return record


def _finish_accepting(folder: Path) -> None:
    """Make an attempt that was accepted, and is still where it was made, a generation."""
    home = folder / ATTEMPT
    if not (home / gen.ENTRY).is_file():
        return
    try:
        number = gen.entry(home / gen.ENTRY).number
    except StateError as err:
        log.warning("an attempt that was accepted is damaged and given up: %s", str(err).splitlines()[0])
        discard_attempt(folder)
    else:
        gen.put(folder, home, number)


def put_in_place(folder: Path, record: Record, number: int) -> Record:
    """Switch to a new generation and write that down. Raises OutputError."""
    (folder / REJECTED).unlink(missing_ok=True)  # before it is written down: what follows is done again, this is not
    gen.switch(folder, number)
    record = dataclasses.replace(record, accepted=number)
    gen.write_record(folder, record)
    return record


def names(record: Record) -> tuple[str, ...]:
    """The files of each generation that the state folder has links to."""
    return (ADAPTER, *(FUSED[name] for name in record.formats))


def prune(folder: Path, keep: int) -> None:
    """Remove all generations but the one in place and the ``keep - 1`` before it. Raises OutputError."""
    current = gen.current(folder)
    kept = [] if current is None else gen.ancestors(folder, current)[:keep]
    for number in gen.numbers(folder):
        if kept and number not in kept:
            gen.remove(folder, number)


def discard_attempt(folder: Path) -> None:
    """Remove what is left of an attempt. Raises OutputError."""
    home = folder / ATTEMPT
    try:
        if home.exists():
            (home / gen.ENTRY).unlink(missing_ok=True)
            shutil.rmtree(home)
    except OSError as err:
        raise OutputError(f"{home} cannot be removed: {err.strerror or err}") from err


def reject(folder: Path, run: dict[str, str], verdict: Verdict) -> None:
    """Write down an attempt that was not accepted, and remove it. Raises OutputError."""
    content = dataclasses.asdict(Rejected(gen.SCHEMA, run, verdict))
    atomic_write(folder / REJECTED, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    discard_attempt(folder)


def rejected(folder: Path) -> Rejected | None:
    """The last attempt, where it was not accepted. Raises StateError if rejected.json is damaged."""
    path = folder / REJECTED
    return gen.read(Rejected, path) if path.exists() else None


def status(folder: Path) -> Status:
    """What is in a state folder; changes nothing. Raises StateError if it is none."""
    record = gen.read_record(folder)
    history = resume.progress(folder / ATTEMPT)
    last = rejected(folder)
    return Status(
        current=gen.current(folder),
        kept=tuple(_kept(folder, number) for number in gen.numbers(folder)),
        formats=record.formats,
        unfinished=None if history is None else len(history.losses),
        rejected=() if last is None else last.verdict.reasons,
    )


def rollback(folder: Path, to: int | None = None) -> tuple[int | None, int]:
    """Put the generation that the one in place was made from (or generation ``to``) in its place: one rename.

    Returns the numbers before and now. The newer one stays, until the next is accepted.

    Raises StateError if there is none, or it is damaged; BusyError while another process works there.
    """
    record = gen.read_record(folder)
    with locked(folder):
        before = gen.current(folder)
        target = _parent(folder, before) if to is None else to
        gen.read_generation(folder, target)
        gen.switch(folder, target)
        gen.link_files(folder, names(record))
        return before, target


def _parent(folder: Path, number: int | None) -> int:
    if number is None:
        raise StateError(f"{folder} has no generation in place; choose one: --to NUMBER")
    parent = gen.read_generation(folder, number).parent
    if parent is None:
        raise StateError(f"generation {number} is the artifact's own model; there is nothing before it")
    if parent not in gen.numbers(folder):
        raise StateError(
            f"generation {parent}, which {number} was made from, is not kept any more; there are "
            f"{', '.join(map(str, gen.numbers(folder)))} (--to NUMBER)"
        )
    return parent


def _kept(folder: Path, number: int) -> Kept:
    try:
        found = gen.read_generation(folder, number)
    except StateError as err:
        return Kept(number, None, None, 0, str(err))
    accuracy = None if found.verdict is None else found.verdict.after
    return Kept(number, found.parent, accuracy, sum(file.nbytes for file in found.files.values()))


def _require_empty(folder: Path) -> None:
    """Raise OutputError if a run without generations wrote there."""
    own = [name for name in (ADAPTER, *FUSED.values(), REPORT, resume.FOLDER) if (folder / name).exists()]
    if own:
        raise OutputError(
            f"{folder} holds {', '.join(own)} of a run without --keep-if-better; choose another folder for the "
            "generations that it keeps"
        )
