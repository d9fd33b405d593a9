"""Adapts a model on a small file system of its own; run as a script inside of user and mount namespaces::

    unshare -rm python full_disk.py ARTIFACT DATA FOLDER

Prints a JSON object: what was raised for each size and stage, and whether anything was lost.
"""

from __future__ import annotations

import collections
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import OutputError
from lorac_runtime.training import Progress

CONFIG = FinetuneConfig(epochs=2, lr=0.02, batch_size=80, threads=1, checkpoint_every=0.0)
FILES = ("adapter.safetensors", "fused.onnx")


def mounted(folder: Path, kilobytes: int) -> None:
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def unmounted(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def in_place(state: Path) -> tuple[str, ...] | None:
    """The hashes of the files that an app finds; None where there are none yet."""
    if not all((state / name).exists() for name in FILES):
        return None
    return tuple(hashlib.sha256((state / name).read_bytes()).hexdigest() for name in FILES)


def tried(artifact: Path, data: Path, state: Path, on_progress: Callable[[Progress], None] = lambda p: None) -> str:
    """What an attempt raises; "" if it is accepted. No other error than OutputError is allowed."""
    try:
        found = adapt(artifact, data, state, CONFIG, on_progress=on_progress)
    except OutputError as err:
        return str(err)
    assert found.verdict.accepted
    return ""


def by_size(artifact: Path, data: Path, folder: Path, expected: tuple[str, ...]) -> list[str]:
    """From too small for anything to large enough, in steps of a page or two; then more room and the same again."""
    said = []
    for kilobytes in range(4, 2000, 12):
        mounted(folder, kilobytes)
        state = folder / "state"
        text = tried(artifact, data, state)
        said.append(text)
        found = in_place(state)
        assert found is None or found == expected or "generations" in str((state / "current").readlink())
        if text:
            mount("-o", "remount,size=64m", folder)
            again = tried(artifact, data, state)
            assert again == "", again
        assert in_place(state) == expected, f"other files with {kilobytes} KB"
        unmounted(folder)
        if not text:
            break
    return said


def by_stage(artifact: Path, data: Path, folder: Path, expected: tuple[str, ...]) -> list[str]:
    """The file system becomes read-only after some step."""
    said = []
    for stop in range(1, 7):
        mounted(folder, 64 << 10)
        state = folder / "state"

        def read_only(progress: Progress, stop: int = stop) -> None:
            if progress.step == stop:
                mount("-o", "remount,ro", folder)

        said.append(tried(artifact, data, state, read_only))
        kept = in_place(state)
        assert kept is not None  # the base is in place
        said.append(tried(artifact, data, state))  # still read-only
        assert in_place(state) == kept
        mount("-o", "remount,rw", folder)
        assert tried(artifact, data, state) == ""
        assert in_place(state) == expected
        unmounted(folder)
    return said


def main() -> None:
    artifact, data, folder = map(Path, sys.argv[1:])
    mounted(folder, 64 << 10)
    assert tried(artifact, data, folder / "state") == ""
    expected = in_place(folder / "state")
    assert expected is not None
    unmounted(folder)
    refused_early = by_size(artifact, data, folder, expected)
    plenty = collections.namedtuple("plenty", "total used free")(1 << 40, 0, 1 << 40)
    shutil.disk_usage = lambda path: plenty  # type: ignore[assignment,misc,return-value]
    found = {
        "refused early": refused_early,
        "full in between": by_size(artifact, data, folder, expected),
        "read-only": by_stage(artifact, data, folder, expected),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
