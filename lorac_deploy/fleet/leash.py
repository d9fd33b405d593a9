"""``python -m lorac_deploy.fleet.leash COMMAND...``: run a command that ends when whoever started it does.

Its standard input is a pipe that the starter holds open. However the starter ends, killed too, the pipe closes, and the
command is ended with everything that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

STOPS = 10.0  # seconds between asking and killing


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
