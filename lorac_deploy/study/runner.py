"""Run a study's grid in parallel processes; what is there already is not run again."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorac_deploy.study.bench import CLEAN, Bench, make_artifact, make_local, make_test, open_bench
from lorac_deploy.study.cells import grid
from lorac_deploy.study.config import StudyConfig
from lorac_deploy.study.worker import Row, read_row, row_file, run_cell

OnProgress = Callable[[str, int, int], None]  # what is done, how many of it, of how many
Task = tuple[Callable[..., Any], tuple[Any, ...]]


def run_study(config: StudyConfig, out: Path, *, workers: int | None = None, on_progress: OnProgress) -> list[Row]:
    """Run all cells of a study that have no row yet; returns the rows of the whole grid, in its order.

    ``workers`` processes, each on one thread, work at a time (None: as many as there are processors). A study that was
    stopped goes on where it was when it is run again on the same folder; a cell whose method, data or files changed is
    another cell.

    Raises StudyError, for a method that does not fit the network too; OSError.
    """
    bench = open_bench(config, out)
    cells = grid(config)
    count = workers or os.cpu_count() or 1
    with _pool(count) as pool:
        _all(pool, _preparations(bench), "preparing", on_progress)
        missing = [cell for cell in cells if read_row(row_file(bench, cell)) is None]
        done = len(cells) - len(missing)
        _all(pool, [(run_cell, (bench, cell)) for cell in missing], "cells", on_progress, done=done)
    return [row for cell in cells if (row := read_row(row_file(bench, cell))) is not None]


def _preparations(bench: Bench) -> list[Task]:
    """Artifacts first: data are read as they say. A method's first seed stands for all where data are prepared."""
    config = bench.config
    first = config.methods[0]
    make_artifact(bench, first, config.seeds[0])
    spec = bench.artifact(first, config.seeds[0])
    tasks: list[Task] = [(make_test, (bench, drift, spec)) for drift in dict.fromkeys((CLEAN, *config.drifts))]
    tasks += [(make_local, (bench, drift, seed, spec)) for drift in config.drifts for seed in config.seeds]
    artifacts = {bench.artifact(method, seed): (method, seed) for method in config.methods for seed in config.seeds}
    return [*tasks, *((make_artifact, (bench, *one)) for one in artifacts.values())]


def _all(pool: ProcessPoolExecutor, tasks: list[Task], what: str, on_progress: OnProgress, *, done: int = 0) -> None:
    total = done + len(tasks)
    on_progress(what, done, total)
    futures = [pool.submit(function, *arguments) for function, arguments in tasks]
    for future in _finished(futures):
        future.result()
        done += 1
        on_progress(what, done, total)


def _finished(futures: list[Future[Any]]) -> Iterator[Future[Any]]:
    """As they finish; if one fails, or the user interrupts, those not begun are dropped."""
    try:
        yield from concurrent.futures.as_completed(futures)
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own that take one thread each: results then depend on nothing but the cell."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        _restore(before.items())


def _restore(variables: Iterable[tuple[str, str | None]]) -> None:
    for name, value in variables:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
