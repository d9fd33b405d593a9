"""Networks for segmentation on the way of `benchmarks.timm_way`; fills in their table in docs/tasks.md.

A loss over pixels (a tenth of them without a label), a step compared with PyTorch's in float64, files fused, verified.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.interpreters import ROOT
from benchmarks.marks import filled
from benchmarks.timm_row import Row
from lorac_deploy.models import ModelSpec
from lorac_deploy.segmentation_nets import SEGMENTATION_NETS
from lorac_runtime.files import atomic_write
from lorac_runtime.tasks import SEGMENTATION

NAMES, PIXELS, CLASSES = SEGMENTATION_NETS, 64, 10
OUT, PAGE = ROOT / "docs" / "results" / "segmentation.json", ROOT / "docs" / "tasks.md"


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each network."""
    lines = [
        "| network | parameters | adapters | loss | step | ONNX | TFLite |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        step = "no" if row.step_error is None else f"{row.step_error:.0e} ({row.torch_error:.0e})"
        loss = "no" if row.loss_error is None else f"{row.loss_error:.0e}"
        files = [row.dropin, row.tflite or row.tflite_dropin]
        cells = [f"`{row.name}`", f"{row.parameters:,}", f"{row.adapters}", loss, step]
        cells += ["drop-in" if text == "" else text or "not reached" for text in files]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure, write the results and the table."""
    p = argparse.ArgumentParser(prog="python -m benchmarks segmentation", description=__doc__)
    p.add_argument("names", nargs="*", default=NAMES, help="networks (default: all)")
    p.add_argument("--out", type=Path, default=OUT, help="JSON file (default: %(default)s)")
    p.add_argument("--page", type=Path, default=PAGE, help="the page that shows it (default: %(default)s)")
    args = p.parse_args(argv)
    warnings.simplefilter("ignore")
    from benchmarks.timm_way import measured

    rows = []
    for name in args.names:
        rows.append(measured(ModelSpec(name, CLASSES, task=SEGMENTATION), Row(name, SEGMENTATION, PIXELS)))
        print(rows[-1], file=sys.stderr, flush=True)
    atomic_write(args.out, (json.dumps([row.as_dict() for row in rows], indent=1) + "\n").encode())
    atomic_write(args.page, filled(args.page.read_text(encoding="utf-8"), "networks", table(rows)).encode())
    return 0
