"""Fill in docs/results.md: tables of finished benchmarks between the page's marks, plots beside it.

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands outside is prose, and stays.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.page_tables import PLOTS, TABLES

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Fill in every table whose results are there, and say which are not."""
    p = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    p.add_argument("--results", type=Path, required=True, help="folder that holds the benchmarks' results")
    p.add_argument("--page", type=Path, default=PAGE, help="default: docs/results.md")
    args = p.parse_args(argv)
    missing: list[str] = []
    text = filled(args.page.read_text(encoding="utf-8"), args.results, missing)
    args.page.write_text(text, encoding="utf-8")
    plots = args.page.with_suffix("")
    plots.mkdir(exist_ok=True)
    for name, source in PLOTS.items():
        if (args.results / source).is_file():
            shutil.copyfile(args.results / source, plots / name)
        else:
            missing.append(name)
    for name in missing:
        print(f"left as it was, no results: {name}")
    return 0


def filled(text: str, results: Path, missing: list[str]) -> str:
    """The page's text with its tables made anew; names of those without results are added to ``missing``.

    Raises KeyError for a mark that no table has.
    """

    def made(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{TABLES[found[2]](results).strip()}\n\n{found[3]}"
        except FileNotFoundError:
            missing.append(found[2])
            return found[0]

    return MARKED.sub(made, text)
