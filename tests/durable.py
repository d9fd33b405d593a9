"""Watches in which order a process writes, flushes and renames, and tells what a power cut could take.

Run as a script in a fresh Python::

    python durable.py ARTIFACT DATA STATE [forget]

makes the attempts of kill_cases.py and a rollback, and prints what is wrong, a line each, then how much it saw. With
``forget`` nothing reaches the disk. A disk keeps what was flushed, in any order what was not, so: a file is flushed
before it is renamed; so is all within a folder, and the folder, before that is renamed; nothing is removed before the
last rename is on the disk; and in the end every rename is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kill_cases import ATTEMPTS, Attempt

from lorac_runtime import state as states

WRITES = os.O_WRONLY | os.O_RDWR


class Watch:
    """What is not on the disk yet of a folder and all below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: set[str] = set()  # written since they were last flushed
        self.folders: dict[str, str] = {}  # changed since they were last flushed, and by what
        self.problems: list[str] = []
        self.renames = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """An audit hook: called before the operation."""
        if event == "open" and isinstance(arguments[0], str) and int(str(arguments[2] or 0)) & WRITES:
            self._written(arguments[0])
        elif event == "os.rename":
            self._renamed(*map(str, arguments[:2]))
        elif event in ("os.remove", "shutil.rmtree"):
            self._removed(str(arguments[0]))

    def flushed(self, path: str) -> None:
        """A file or a folder was flushed."""
        self.files.discard(path)
        self.folders.pop(path, None)

    def _inside(self, path: str) -> bool:
        return path.startswith(f"{self.root}{os.sep}")

    def _written(self, path: str) -> None:
        if self._inside(path) and not Path(path).name.startswith(".probe"):
            self.files.add(path)

    def _renamed(self, source: str, target: str) -> None:
        if not self._inside(target):
            return
        self.renames += 1
        below = [path for path in (*self.files, *self.folders) if path == source or path.startswith(source + os.sep)]
        self.problems += [f"{source} is renamed, but {path} is not flushed" for path in below]
        self.folders[str(Path(target).parent)] = f"{source} -> {target}"

    def _removed(self, path: str) -> None:
        own = Path(path).name.startswith(".")  # what was written beside
        if self._inside(path) and Path(path).exists() and not own:
            self.problems += [f"{path} is removed, but {what} is not flushed" for what in self.folders.values()]


def watch(root: Path, *, forget: bool) -> Watch:
    """From here on, until the process ends."""
    seen, real = Watch(root), os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        if not forget:
            seen.flushed(str(Path(f"/proc/self/fd/{handle}").readlink()))

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(seen)
    return seen


def main() -> None:
    artifact, data, state = map(Path, sys.argv[1:4])
    seen = watch(state.resolve(), forget="forget" in sys.argv[4:])
    for number in range(len(ATTEMPTS)):
        Attempt(artifact, data, number).make(state)
    states.rollback(state)
    seen.problems += [f"{what} is not flushed in the end" for what in seen.folders.values()]
    print(*seen.problems, sep="\n")
    print(seen.renames, "renames")


if __name__ == "__main__":
    main()
