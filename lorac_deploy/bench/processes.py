"""Worker processes as the parent sees them: JSON lines over pipes, and a reason where one fails."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

THREADS = ("OMP_", "MKL_", "GOMP_", "KMP_")  # settings of thread pools that would change what is measured
PATIENCE = 20.0  # seconds that a worker has to end by itself
LAST_WORDS = 40


class WorkerError(Exception):
    """A worker answered with an error, or ended."""


class Worker:
    """A process that answers requests; use it in a ``with`` block."""

    def __init__(self, command: Sequence[str], *, folder: Path | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=worker_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises WorkerError with the worker's own reason."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; what it wrote says why
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        return f"ended with status {code}: {' '.join(self._log.read().split()[-LAST_WORDS:])}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, kindly first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def worker_environment() -> dict[str, str]:
    """Environment variables of a worker: ours, but for those that set numbers of threads."""
    return {k: v for k, v in os.environ.items() if not k.startswith(THREADS)} | {"ORT_DISABLE_TELEMETRY": "1"}
