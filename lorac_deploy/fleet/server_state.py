"""What the server of a fleet knows, on disk after each round: the adapter so far, and what happened.

``state.json`` names the adapter file that belongs to it, and is written after that file: a server that is killed at any
moment leaves the last whole round.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.errors import CheckpointError, listed
from lorac_runtime.expected import state_problems
from lorac_runtime.files import atomic_write, size_of
from lorac_runtime.fleet.payload import Tensors
from lorac_runtime.manifest import Manifest, sha256
from lorac_runtime.resume import differences
from lorac_runtime.schema import decode

FILE_NAME = "state.json"
SCHEMA = 1
MAX_BYTES = 256 << 20
_NAME = re.compile(r"round-(\d{5,})\.safetensors")


@dataclasses.dataclass(frozen=True)
class ClientRound:
    """One client in one round: ``weight`` in the mean, ``norm`` of its change, and its own figures."""

    client: str
    weight: float
    norm: float
    figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class RoundRecord:
    """A round that counted. ``error`` is the largest of the layers' errors of keeping the mean by factors.

    ``refused``: "rejected" or "failed", client and reason, a line each; ``silent`` clients gave no answer in time.
    """

    round: int
    asked: int
    clients: tuple[ClientRound, ...]
    refused: tuple[str, ...]
    silent: int
    down: int
    up: int
    error: float


@dataclasses.dataclass(frozen=True)
class ServerState:
    """``run`` is what a fleet that goes on must share; ``adapter`` the file of what has been learned, "" before the
    first round, and ``sha256`` its digest.
    """

    schema: int
    run: dict[str, str]
    adapter: str = ""
    sha256: str = ""
    rounds: tuple[RoundRecord, ...] = ()

    @property
    def done(self) -> int:
        """How many rounds have counted."""
        return len(self.rounds)


def read_state(out: Path, run: Mapping[str, str]) -> ServerState:
    """What is in ``out``, or a new state. Raises CheckpointError if it is damaged or of a fleet with other settings."""
    path = out / FILE_NAME
    if not path.exists():
        return ServerState(SCHEMA, dict(run))
    try:
        size_of(path, MAX_BYTES)
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read ({err}): remove {out} to begin anew") from err
    problems: list[str] = []
    found = decode(ServerState, raw, "", problems)
    if not problems and found.schema != SCHEMA:
        problems = [f"schema: {found.schema}, this version reads {SCHEMA}"]
    if problems:
        raise CheckpointError(listed(f"{path} is not the state of a fleet:", problems))
    if found.run != dict(run):
        headline = f"{out} holds a fleet with other settings; give these again, or another --out. What differs:"
        raise CheckpointError(listed(headline, differences(found.run, dict(run))))
    return cast(ServerState, found)


def adapter_of(out: Path, state: ServerState, manifest: Manifest) -> Tensors | None:
    """What has been learned so far; None before the first round. Raises CheckpointError if the file is not whole."""
    if not state.adapter:
        return None
    path = out / state.adapter
    if not _NAME.fullmatch(state.adapter) or not path.is_file() or sha256(path) != state.sha256:
        raise CheckpointError(f"{path} is missing or was altered: remove {out} to begin anew")
    tensors = load_adapter(path).tensors
    problems = state_problems(manifest, tensors)
    if problems:
        raise CheckpointError(listed(f"{path} is not an adapter of this artifact:", problems))
    return tensors


def write_state(
    out: Path, before: ServerState, record: RoundRecord, tensors: Tensors, metadata: dict[str, str]
) -> ServerState:
    """The state after another round, on disk. Raises OutputError; then the state before is still there, whole."""
    name = f"round-{record.round:05d}.safetensors"
    save_adapter(out / name, tensors, metadata)
    rounds = (*before.rounds, record)
    state = dataclasses.replace(before, adapter=name, sha256=sha256(out / name), rounds=rounds)
    atomic_write(out / FILE_NAME, (json.dumps(dataclasses.asdict(state), indent=1) + "\n").encode())
    for path in out.iterdir():
        if _NAME.fullmatch(path.name) and path.name != name:
            path.unlink(missing_ok=True)
    return state
