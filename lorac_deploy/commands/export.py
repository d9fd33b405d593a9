"""`lorac-deploy export ARTIFACT --to FORMAT --out FILE`: a file for an app, with an adapter fused into it or not."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._share import SHARED, add_options, config_of, problem, share
from lorac_deploy.commands._tflite import tflite_rows
from lorac_exporters.tflite_config import IO_DTYPES, WEIGHTS, TfliteConfig

if TYPE_CHECKING:
    from lorac_deploy.file_export import FileReport

TARGETS = ("tflite", "onnx")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy export",
        description="Write the network of ARTIFACT, with an adapter fused into it if one is given, as one file for an "
        "app; or, with --to peft, onnx_adapter, adapter or state-dict, an adapter for other libraries. The artifact "
        "itself is not changed.",
    )
    p.add_argument(
        "artifact",
        type=Path,
        help="folder that export-training-artifact wrote; for other libraries also the checkpoint folder, with the "
        "network's tensors as PyTorch knows them",
    )
    p.add_argument("--to", choices=(*TARGETS, *SHARED), required=True, help="format of the file, or of the folder")
    p.add_argument("--out", type=Path, help="what to write; an earlier file is replaced")
    p.add_argument(
        "--adapter", type=Path, help="adapter.safetensors to fuse or to convert (default: none, the base network)"
    )
    p.add_argument(
        "--data",
        type=Path,
        help="labelled images (.npz, class folders, or images and masks): report how the file answers",
    )
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    _add_tflite_options(p)
    add_options(p)
    return p


def _add_tflite_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("how TFLite stores it (with --to tflite)")
    g.add_argument(
        "--weights",
        choices=WEIGHTS,
        help=f"fp16 halves the file, int8 quarters it (default: {TfliteConfig().weights})",
    )
    g.add_argument(
        "--calibration",
        type=Path,
        help="for int8: images (.npz or class folders) from which the ranges of activations are measured (default: "
        "the ranges of the artifact's base.tflite, if that is int8)",
    )
    g.add_argument(
        "--input-dtype",
        choices=IO_DTYPES,
        help="uint8: raw images, normalised inside; int8: quantized, with int8 weights (default: as in the artifact)",
    )
    g.add_argument(
        "--output-dtype",
        choices=IO_DTYPES,
        help="uint8 and int8: quantized logits, with int8 weights (default: float32)",
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    from lorac_deploy.file_export import config_problem

    with usage_errors(p):
        config = _config(args)
    mistake = problem(args) or config_problem("onnx" if args.to in SHARED else args.to, config, args.calibration)
    if mistake:
        p.error(mistake)
    if args.to in SHARED:
        with usage_errors(p):
            settings = config_of(args)
        return share(args, *settings)
    with Console(stderr=True).status("reading the artifact") as status:
        report = _export(args, config, lambda text: status.update(text))
    if args.json:
        print(json.dumps(_as_dict(report), indent=1))
    else:
        _show(report)
    return 0


def _config(args: argparse.Namespace) -> TfliteConfig | None:
    """What was given; None for ONNX unless options of TFLite were given all the same."""
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(TfliteConfig)}
    given = {name: value for name, value in fields.items() if value is not None}
    return TfliteConfig(**given) if given or args.to == "tflite" else None


def _export(args: argparse.Namespace, config: TfliteConfig | None, on_progress: Callable[[str], None]) -> FileReport:
    from lorac_deploy.file_export import export_file

    return export_file(
        args.artifact,
        args.out,
        to=args.to,
        adapter=args.adapter,
        config=config,
        calibration=args.calibration,
        data=args.data,
        on_progress=on_progress,
    )


def _as_dict(report: FileReport) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "path": str(report.path)}


def _show(report: FileReport) -> None:
    console = Console()
    table = Table(show_header=False, title=f"{report.path}")
    table.add_row("size", f"{report.nbytes / 1e6:.2f} MB")
    for name, text in () if report.tflite is None else tflite_rows(report.tflite):
        table.add_row(name, text)
    if report.cut_off:
        listed = ", ".join(f"{share:.2%} of {name}" for name, share in report.cut_off)
        table.add_row("at the ends of int8", listed)
    table.add_row("time", f"{report.seconds:.1f} s")
    console.print(table)
    if report.accuracies:
        console.print(_accuracy_table(report))


def _accuracy_table(report: FileReport) -> Table:
    title = f"on {report.images} images{', by pixel' if report.by_pixel else ''}"
    table = Table("file", "accuracy", "same class as ONNX", "largest difference", title=title)
    for row in report.accuracies:
        table.add_row(row.file, f"{row.accuracy:.2%}", f"{row.agreement:.2%}", f"{row.max_difference:.2e}")
    return table
