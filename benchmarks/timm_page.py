"""docs/timm.md from rows."""

from __future__ import annotations
from collections.abc import Sequence
from benchmarks.timm_row import Row


def page(rows: Sequence[Row]) -> str:
    return "\n".join(map(str, rows))
