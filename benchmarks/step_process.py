"""Worker processes as the parent sees them. Only one computes at a time; the others wait on a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.interpreters import ROOT
from benchmarks.step_protocol import Job

SETTLE = 0.05  # seconds: threads of an OpenMP team spin for some milliseconds after their work


class WorkerError(Exception):
    """A worker answered with an error, or ended."""


class Worker:
    """A process that runs ``module`` with ``interpreter`` on a job; use it in a ``with`` block."""

    def __init__(self, interpreter: Path, module: str, job: Job) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(interpreter), "-m", module, json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))},
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
        return f"ended with status {code}: {' '.join(self._log.read().split()[-40:])}"

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
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


@dataclasses.dataclass(frozen=True)
class Opened:
    """Workers by name that have made their first steps, the losses of these, and why others have not."""

    workers: dict[str, Worker]
    losses: dict[str, list[float]]
    refused: dict[str, str]


@contextlib.contextmanager
def opened(jobs: dict[str, tuple[Path, str, Job]], *, warmup: int) -> Iterator[Opened]:
    """Start workers one after the other, each alone; ``jobs`` hold `Worker`'s arguments. They end with the block."""
    with contextlib.ExitStack() as stack:
        found = Opened({}, {}, {})
        for name, arguments in jobs.items():
            worker = stack.enter_context(Worker(*arguments))
            try:
                found.losses[name] = worker.ask("step", count=warmup)["losses"]
            except WorkerError as err:
                found.refused[name] = str(err)
            else:
                found.workers[name] = worker
        yield found
