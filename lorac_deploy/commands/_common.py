"""What every command shares: errors as one message and an exit status, and option mistakes as usage."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lorac_runtime.errors import LoracDeployError

_NO_MEMORY = ("can't allocate memory", "out of memory")  # PyTorch's words, on the CPU and on a GPU
FAILED, INTERRUPTED = 1, 130  # 2 is argparse's own, for a wrong command line


class Main(Protocol):
    """A command: takes its arguments (None: those of the process), returns the exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command."""
        ...


def guarded(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Give what goes wrong for the user as ``error: ...`` on stderr, exit status 1; bugs keep their traceback.

    >>> @guarded
    ... def main(argv: Sequence[str] | None = None) -> int:
    ...     raise LoracDeployError("no such model")
    >>> main([])
    1
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:
            return _report("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to flush to
            return FAILED
        except (LoracDeployError, OSError) as err:
            return _report(str(err), FAILED)
        except (MemoryError, RuntimeError) as err:
            if isinstance(err, RuntimeError) and not any(words in str(err) for words in _NO_MEMORY):
                raise
            return _report(f"out of memory; try a smaller --batch-size or less data ({err})", FAILED)

    return run


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report a ValueError, raised where options become settings, as a mistake in the command line (status 2)."""
    try:
        yield
    except ValueError as err:
        parser.error(str(err))


def _report(text: str, status: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return status
