"""What a run tells while it goes on: lines for a person, or one JSON object per event for a program."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from lorac_runtime.engines import MODULES
from lorac_runtime.errors import DataError, LoracDeployError
from lorac_runtime.training import Progress

_PUBLIC = ("", *MODULES)


class Shows(Protocol):
    """Whoever is told what happens."""

    quiet: bool

    def progress(self, p: Progress) -> None:
        """A step was taken."""

    def logged(self, record: logging.LogRecord) -> None:
        """The library says something."""

    def failed(self, err: BaseException, text: str, status: int) -> int:
        """The command ends with the exit ``status``, for the reason ``text``; returns it."""

    def event(self, name: str, **figures: Any) -> None:
        """Something that a program may act on."""


class Events:
    """One JSON object per line. It holds no image, label or file name of local data (docs/device.md): of the values in
    messages only numbers and names of engines, and of what is wrong with the data only that it is.
    """

    quiet = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def progress(self, p: Progress) -> None:
        """An epoch is over."""
        if p.epoch_done:
            self.event("epoch", epoch=p.epoch, epochs=p.epochs, loss=p.loss, seconds=round(p.seconds, 3))

    def logged(self, record: logging.LogRecord) -> None:
        """A message, with dots where a value might tell something of the data."""
        values = record.args if isinstance(record.args, tuple) else ()
        shown = tuple(v if isinstance(v, int | float) or v in _PUBLIC else "..." for v in values)
        self.event("message", level=record.levelname.lower(), text=str(record.msg) % shown if shown else record.msg)

    def failed(self, err: BaseException, text: str, status: int) -> int:
        """See `Shows.failed`."""
        private = isinstance(err, DataError)
        said = "local data cannot be used; without --events the command says why" if private else text
        self.event("failed", kind=type(err).__name__, status=status, text=said)
        return status

    def event(self, name: str, **figures: Any) -> None:
        """Write a line."""
        print(json.dumps({"event": name, **figures}, allow_nan=False), file=self._stream, flush=True)


class Display:
    """Progress and messages for a person; on a terminal the line of the current epoch is updated in place."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self.quiet = stream, quiet
        self._live = stream.isatty() and not quiet
        self._width = 0  # of the unfinished line on the terminal

    def progress(self, p: Progress) -> None:
        """Show a step."""
        if self._live:
            self._write(_line(p), end="\n" if p.epoch_done else "")
        elif p.epoch_done and not self.quiet:
            self._write(_line(p))

    def message(self, text: str) -> None:
        """A line of its own."""
        if self._width:
            self._write("")
        self._write(text)

    def logged(self, record: logging.LogRecord) -> None:
        """A message, marked where it is a warning."""
        self.message(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())

    def failed(self, err: BaseException, text: str, status: int) -> int:
        """Say why, return ``status``."""
        self.message(f"error: {text}" if isinstance(err, LoracDeployError | MemoryError) else text)
        return status

    def event(self, name: str, **figures: Any) -> None:
        """Nothing: a person reads the table."""

    def _write(self, text: str, end: str = "\n") -> None:
        """Write over the unfinished line, if there is one."""
        back = "\r" if self._width else ""
        print(back + text.ljust(self._width), end=end, file=self._stream, flush=True)
        self._width = 0 if end else len(text)


def _line(p: Progress) -> str:
    width = len(str(p.epochs))
    return (
        f"epoch {p.epoch:{width}}/{p.epochs}  step {p.step}/{p.steps}  loss {p.loss:.4f}  lr {p.lr:.2e}  "
        f"{p.seconds:.1f} s  eta {p.eta:.0f} s"
    )


@contextlib.contextmanager
def logged_to(display: Shows) -> Iterator[None]:
    """Show what the library logs: information unless quiet, warnings always."""
    handler = _Handler(display)
    log = logging.getLogger("lorac_runtime")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if display.quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class _Handler(logging.Handler):
    def __init__(self, display: Shows) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.logged(record)
