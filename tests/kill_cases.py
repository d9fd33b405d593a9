"""Kills a process that adapts a model, at every operation on files or at random, and looks at what is left.

Run as a script in a fresh Python::

    python kill_cases.py ARTIFACT DATA WORK {boundaries|random} STEP COUNT SEED

It makes three attempts in one state: one that is accepted, one that is not, and one after which the oldest
generation is removed. Each begins many times from where the one before left the state, is killed, perhaps once more,
and is then left to finish. A line for each, ``attempt,place,kills,outcome``; an error as soon as anything is lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig

# Few steps, a checkpoint after each: many writes, little arithmetic.
CONFIG = FinetuneConfig(epochs=4, lr=0.3, batch_size=60, threads=1, checkpoint_every=0.0)
ATTEMPTS = (("first.npz", True), ("first.npz", False), ("second.npz", True))  # and whether it is accepted
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.rmtree"}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The same command, however often it is given."""

    artifact: Path
    data: Path
    number: int

    def make(self, state: Path, keep: int = 2) -> None:
        name, accepted = ATTEMPTS[self.number]
        found = adapt(self.artifact, self.data / name, state, dataclasses.replace(CONFIG, seed=self.number), keep=keep)
        assert found.verdict.accepted == accepted, found.verdict


def die_before(count: int) -> None:
    """Make this process kill itself before the operation on files after ``count`` ones inside of the work folder."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        reads = event == "open" and not (len(arguments) > 2 and int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR))
        if event in WATCHED and not reads:
            seen += 1
            if seen > count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at_boundary(attempt: Attempt, state: Path, count: int) -> bool:
    """Whether the process was killed, rather than done before it came so far."""
    pid = os.fork()
    if pid == 0:
        die_before(count)
        attempt.make(state)
        os._exit(0)
    return _was_killed(pid)


def killed_after(attempt: Attempt, state: Path, seconds: float) -> bool:
    """Whether a kill from outside struck the process while it worked."""
    pid = os.fork()
    if pid == 0:
        attempt.make(state)
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return _was_killed(pid)


def finished(attempt: Attempt, state: Path, keep: int = 2) -> float:
    """Let a process do all that is left; how long it took."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        attempt.make(state, keep)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the same command ended with {status}"
    return time.monotonic() - started


def _was_killed(pid: int) -> bool:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the process ended with {status}"
    return status != 0


def whole_files(state: Path) -> dict[str, str]:
    """What an app could open, by sha256, links followed; and what else is there, by name."""
    found = {}
    for path in sorted(state.rglob("*")):
        if path.is_file() and path.name in ("adapter.safetensors", "fused.onnx"):
            found[str(path.relative_to(state))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def names(state: Path) -> list[str]:
    return sorted(str(path.relative_to(state)) for path in state.rglob("*"))


def check_in_place(state: Path, known: set[tuple[str, str]], *, begun: bool) -> bool:
    """An app finds a pair of files that belong together, or none at all before the first was ever in place."""
    paths = [state / name for name in ("adapter.safetensors", "fused.onnx")]
    if not all(path.exists() for path in paths):
        assert not begun, f"{state} had a model in place and has none now"
        return False
    adapter, fused = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    assert (adapter, fused) in known, f"{state} holds files that do not belong together"
    return True


@dataclasses.dataclass
class Killing:
    """Attempts that are killed, from a state ``before`` to what an uninterrupted one makes of it, ``after``."""

    attempt: Attempt
    before: Path
    after: Path
    known: set[tuple[str, str]]
    duration: float
    rng: random.Random
    kills: int = 0

    def strike(self, place: int | None) -> bool:
        """Kill at a place or at random, finish, compare; whether the process lived long enough to be killed."""
        state = self.after.with_name(f"{self.after.name}-killed")
        if self.before.exists():
            shutil.copytree(self.before, state, symlinks=True)
        begun = self.before.exists()
        struck = (
            killed_after(self.attempt, state, self.rng.uniform(0, self.duration))
            if place is None
            else killed_at_boundary(self.attempt, state, place)
        )
        begun = check_in_place(state, self.known, begun=begun) if state.exists() else begun
        self.kills += struck
        if struck and self.rng.random() < 0.3:  # once more, while it makes up for the first one
            self.kills += killed_after(self.attempt, state, self.rng.uniform(0, self.duration))
            begun = check_in_place(state, self.known, begun=begun)
        finished(self.attempt, state)
        assert whole_files(state) == whole_files(self.after), f"{state} ended with other files"
        assert names(state) == names(self.after), sorted(set(names(state)) ^ set(names(self.after)))
        print(self.attempt.number, place, self.kills, "in place" if begun else "none yet", sep=",", flush=True)
        shutil.rmtree(state)
        return struck


def main() -> None:
    artifact, data, folder = map(Path, sys.argv[1:4])
    how, step, count, seed = sys.argv[4], *map(int, sys.argv[5:])
    known, before = pairs(artifact, data, folder / "pairs"), folder / "nothing"
    for number in range(len(ATTEMPTS)):
        after = folder / f"after-{number}"
        if before.exists():
            shutil.copytree(before, after, symlinks=True)
        attempt = Attempt(artifact, data, number)
        killing = Killing(attempt, before, after, known, finished(attempt, after), random.Random(seed + number))
        place = 0
        while killing.strike(place if how == "boundaries" else None) or how == "random":
            place += step
            if killing.kills >= count and how == "random":
                break
        before = after


def pairs(artifact: Path, data: Path, state: Path) -> set[tuple[str, str]]:
    """Adapter and fused file of every generation that there ever is."""
    for number in range(len(ATTEMPTS)):
        finished(Attempt(artifact, data, number), state, keep=99)
    found = whole_files(state)
    homes = {str(Path(name).parent) for name in found if name.startswith("generations/")}
    return {(found[f"{home}/adapter.safetensors"], found[f"{home}/fused.onnx"]) for home in homes}


if __name__ == "__main__":
    main()
