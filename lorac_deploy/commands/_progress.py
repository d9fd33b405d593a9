"""A line on the terminal that says what is being done, how much of it is done, and how long it has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OnProgress = Callable[[str, int, int | None], None]  # what is done, how many of it, of how many


@contextmanager
def counted(first: str) -> Iterator[OnProgress]:
    """Show ``first`` on stderr, then whatever the function that it gives is told.

    >>> with counted("reading") as told:
    ...     told("trials", 1, 8)
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(first, total=None)

        def told(what: str, done: int, total: int | None) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield told
