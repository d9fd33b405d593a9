"""Worker processes as the parent sees them. Only one computes at a time; the others wait on a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import interpreters as envs
from benchmarks.step_cases import Case
from benchmarks.step_competitors import PROJECT_STANDS_IN, Competitor
from benchmarks.step_protocol import Job
from lorac_deploy.bench import processes
from lorac_deploy.bench.processes import WorkerError

__all__ = ["Place", "Session", "Worker", "WorkerError", "Workers", "fresh", "place"]


class Worker(processes.Worker):
    """A process that runs ``module`` with ``interpreter``; use it in a ``with`` block."""

    def __init__(self, interpreter: Path, module: str) -> None:
        super().__init__([str(interpreter), "-m", module], folder=envs.ROOT)

    def __enter__(self) -> Worker:
        return self

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self._process.poll() is not None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a competitor runs; ``note`` says so where that is not the environment it names."""

    interpreter: Path
    note: str = ""


def place(competitor: Competitor, given: Mapping[str, Path], *, quick: bool) -> Place:
    """The interpreter for a competitor.

    Where its environment is not there, the project's own one stands in if it holds the same packages; with ``quick``
    also for the newest onnxruntime. Raises FileNotFoundError with the reason where nothing does.
    """
    name = competitor.environment
    try:
        return Place(envs.python(name, given))
    except FileNotFoundError:
        if name in given or not (name in PROJECT_STANDS_IN or (quick and name == envs.RUNTIME)):
            raise
        return Place(envs.python(envs.PROJECT, given), f"in the environment project, for {name} is not there")


@dataclasses.dataclass(frozen=True)
class Session:
    """A training that is open in a worker."""

    worker: Worker
    name: str
    facts: Mapping[str, float]
    note: str = ""

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """The answer to a request about it."""
        return self.worker.ask(what, name=self.name, **request)


def fresh(competitor: Competitor, given: Mapping[str, Path], *, quick: bool) -> tuple[Worker, Place]:
    """A new process for a competitor. Raises FileNotFoundError where its environment is not there."""
    where = place(competitor, given, quick=quick)
    return Worker(where.interpreter, competitor.worker), where


class Workers:
    """Processes that competitors share, one for each environment and kind of work; use it in a ``with`` block.

    A process is started when it is first needed, so that importing a library is paid for once.
    """

    def __init__(self, given: Mapping[str, Path], *, quick: bool) -> None:
        self._given, self._quick = given, quick
        self._running: dict[tuple[Path, str], Worker] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, competitor: Competitor, case: Case, *, batch: int, threads: int) -> Session:
        """Load what a competitor trains. Raises WorkerError with its reason, FileNotFoundError without a place."""
        place(competitor, self._given, quick=self._quick)  # before the work of making files
        job = case.job(competitor, batch=batch, threads=threads, onnxsim=self._onnxsim)
        return self.open_job(competitor, job)

    def open_job(self, competitor: Competitor, job: Job) -> Session:
        """Load what a job names; raises what `open` raises."""
        where = place(competitor, self._given, quick=self._quick)
        worker, name = self._worker(where, competitor.worker), competitor.label
        try:
            facts = worker.ask("open", name=name, job=dataclasses.asdict(job))
        except WorkerError:
            self._forget_if_ended(worker)
            raise
        return Session(worker, name, facts, where.note)

    def _onnxsim(self) -> Path:
        return envs.python(envs.ONNXSIM, self._given)

    def _worker(self, where: Place, module: str) -> Worker:
        key = (where.interpreter, module)
        if key not in self._running:
            self._running[key] = self._stack.enter_context(Worker(where.interpreter, module))
        return self._running[key]

    def _forget_if_ended(self, worker: Worker) -> None:
        """So that the next competitor gets a new process."""
        if worker.ended:
            self._running = {key: one for key, one in self._running.items() if one is not worker}
