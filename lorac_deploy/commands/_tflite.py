"""What commands say of a .tflite file that was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorac_exporters.tflite import TfliteReport

LISTED = 5


def tflite_rows(report: TfliteReport) -> Iterator[tuple[str, str]]:
    """(name, text) of each thing worth saying; nothing of what is as it should be."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.operators.items())
    yield "weights", f"{report.weights}, input {report.input_dtype}, output {report.output_dtype}"
    yield "operators", f"{sum(report.operators.values())}: {kinds}"
    if report.float_operators:
        yield "in float32", f"{len(report.float_operators)} operators: {shortened(report.float_operators)}"
    if report.overflows:
        yield "beyond fp16", f"{report.overflows} weights, stored as the largest number that fp16 has"
    if report.changed:
        yield "rewritten", f"{len(report.changed)} constants, not to be adapted in place: {shortened(report.changed)}"


def shortened(names: tuple[str, ...]) -> str:
    """The first names of a list, and how many more there are.

    >>> shortened(tuple("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
