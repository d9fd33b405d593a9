"""`lorac-deploy verify BASE FUSED`: is the fused file a drop-in for the base?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorac_deploy.commands._common import guarded
from lorac_exporters.checks import DropinReport

COLOURS = {"pass": "green", "fail": "bold red", "not checked": "yellow"}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy verify",
        description="Check that FUSED can replace BASE, both ONNX or both TFLite: same operators, edges, options, "
        "shapes, dtypes, names, versions and size, only bytes of the patch table differ, and the same answers as the "
        "training graph. Exit status 0 if every check passes, 1 if not.",
    )
    p.add_argument(
        "base",
        type=Path,
        help="base.onnx or base.tflite of an artifact; or the .onnx that the artifact was made from, or any .tflite",
    )
    p.add_argument("fused", type=Path, help="the fused file")
    p.add_argument("--artifact", type=Path, help="folder with manifest.json (default: the folder of BASE)")
    p.add_argument(
        "--adapter", type=Path, help="adapter the file was fused from (default: adapter.safetensors beside FUSED)"
    )
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    from lorac_exporters.verify import verify

    report = verify(args.base, args.fused, artifact=args.artifact, adapter=args.adapter)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report)
    return 0 if report.ok else 1


def _show(report: DropinReport) -> None:
    table = Table("check", "verdict", "detail", title=f"{report.fused} against {report.base}")
    for check in report.checks:
        table.add_row(check.name, f"[{COLOURS[check.verdict]}]{check.verdict}[/]", check.detail)
    console = Console()
    console.print(table)
    console.print("[green]a drop-in[/]" if report.ok else "[bold red]NOT a drop-in[/]")
