"""Where a command's tables go."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 160  # where no terminal says how wide it is


def standard_output() -> Console:
    """Standard output, as wide as its terminal; a file or a pipe takes tables whole."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)
