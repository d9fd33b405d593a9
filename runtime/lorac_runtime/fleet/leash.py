"""``python -m lorac_runtime.fleet.leash COMMAND...``: run a command that ends when whoever started it does.

Its standard input is a pipe that the starter holds open. However the starter ends, killed too, the pipe closes, and the
command is ended with everything that it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import BinaryIO

STOPS = 10.0  # seconds between asking and killing


@contextlib.contextmanager
def leashed(
    command: list[str], environment: Mapping[str, str], log: BinaryIO | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that ends with the block, and with this process however that ends; its words go to ``log``."""
    held = subprocess.Popen(
        [sys.executable, "-m", "lorac_runtime.fleet.leash", *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield held
    finally:
        held.communicate()  # closes this end of the pipe, and waits


def main(command: list[str]) -> int:
    """Run the command in this process's group; returns its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    return child.wait()


def _watch(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()  # until the pipe is closed
    child.terminate()
    try:
        child.wait(STOPS)
    except subprocess.TimeoutExpired:
        child.kill()
    os.killpg(os.getpgid(0), signal.SIGKILL)  # what the command started, and this process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
