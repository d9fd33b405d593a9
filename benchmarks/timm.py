"""Which of timm's convolutional nets go the whole way: train, export, step, fuse, drop-in; docs/timm.md is its page.

Each network is made with random numbers and ten classes, and goes the way that a user's goes, at a small image size:
adapters are attached in PyTorch and saved; the training artifact is exported with them; the engine ``onnxruntime``
makes one step; its result is fused and verified. The loss and the change of every tensor are compared with PyTorch's
in float64. A process for each network; what is done already is read from the results file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.interpreters import ROOT
from benchmarks.timm_page import page
from benchmarks.timm_row import Row
from lorac_runtime.files import atomic_write

FAMILIES = ROOT / "benchmarks" / "timm_families.txt"
OUT, PAGE = ROOT / "docs" / "results" / "timm.json", ROOT / "docs" / "timm.md"


def families(path: Path = FAMILIES) -> dict[str, tuple[str, int]]:
    """Network -> (family, pixels), in the order of the file: ``family  network  pixels`` in each line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {name: (family, int(pixels)) for family, name, pixels in lines}


def measure(name: str, family: str, pixels: int) -> Row:
    """In a process of its own: warnings of timm and PyTorch about themselves are no findings."""
    import warnings

    warnings.simplefilter("ignore")
    from benchmarks.timm_way import go

    return go(name, family, pixels)


def read(path: Path) -> dict[str, Row]:
    """Rows of an earlier run by network; none if there is no such file."""
    if not path.exists():
        return {}
    return {row["name"]: Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))}


def main(argv: Sequence[str]) -> int:
    """Measure what is missing, write the results and the page."""
    p = argparse.ArgumentParser(prog="python -m benchmarks timm", description=__doc__)
    p.add_argument("names", nargs="*", help="networks to measure anew (default: all that the results lack)")
    p.add_argument("--workers", type=int, default=1, help="networks at a time (default: %(default)s)")
    p.add_argument("--out", type=Path, default=OUT, help="JSON file (default: %(default)s)")
    p.add_argument("--page", type=Path, default=PAGE, help="the page that shows it (default: %(default)s)")
    args = p.parse_args(argv)
    known, rows = families(), read(args.out)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        p.error(f"{', '.join(unknown)}: not in {FAMILIES.name}")
    wanted = args.names or [name for name in known if name not in rows]
    for count, row in enumerate(_measured(wanted, known, args.workers), 1):
        rows[row.name] = row
        ordered = [rows[name] for name in known if name in rows]
        atomic_write(args.out, (json.dumps([r.as_dict() for r in ordered], indent=1) + "\n").encode())
        print(f"{count} of {len(wanted)}: {row}", file=sys.stderr, flush=True)
    atomic_write(args.page, page([rows[name] for name in known if name in rows]).encode())
    return 0


def _measured(names: Sequence[str], known: dict[str, tuple[str, int]], workers: int) -> Iterable[Row]:
    """As they are done. A process ends after a few networks, so that their memory is not kept."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=4) as pool:
        yield from pool.imap_unordered(_measure, [(name, *known[name]) for name in names])


def _measure(case: tuple[str, str, int]) -> Row:
    return measure(*case)
