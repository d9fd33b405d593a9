"""One page of a results file: ``report/index.html``, which needs nothing else, neither files nor a network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report_input import check, read
from benchmarks.rows import Results
from lorac_runtime.errors import OutputError
from lorac_runtime.files import atomic_write

NAME = "index.html"
NEEDS = 'the report needs jinja2 and matplotlib ({}): pip install "lorac-deploy[benchmarks]"'


def write(results: Results, folder: Path, previous: Results | None = None) -> Path:
    """Write the page, compared with a ``previous`` run if there is one; returns its file.

    Raises ValueError for results that cannot be shown, ImportError where jinja2 or matplotlib is missing,
    OutputError or OSError if the page cannot be written.
    """
    try:
        from benchmarks.report_render import page
    except ImportError as err:
        raise ImportError(NEEDS.format(err)) from err
    for one in (results, previous):
        if one is not None:
            check(one)
    content = page(results, previous).encode()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / NAME, content)
    return folder / NAME


def main(argv: Sequence[str]) -> int:
    """Write the page and say where it is."""
    p = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    p.add_argument("results", type=Path, help="JSON file that a benchmark of the suite wrote")
    p.add_argument("--out", type=Path, default=Path("report"), help="folder of the page (default: %(default)s)")
    p.add_argument("--previous", type=Path, help="results file of an earlier run, to compare with")
    args = p.parse_args(argv)
    try:
        previous = read(args.previous) if args.previous else None
        print(f"written: {write(read(args.results), args.out, previous)}")
    except (ValueError, OSError, ImportError, OutputError) as err:
        p.error(str(err))
    return 0
