"""`lorac-deploy certify ARTIFACT --data IMAGES`: do PyTorch, ONNX and TFLite answer alike?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_exporters.certificate import AGREEMENT, RELATIVE, Tolerance, spread

if TYPE_CHECKING:  # they import PyTorch
    from lorac_deploy.certificate import Certified
    from lorac_deploy.data import Dataset
    from lorac_exporters.certificate import OutputReport, PairReport
    from lorac_runtime.manifest import Manifest

COLOURS = {"pass": "green", "inaccurate": "bold yellow", "fail": "bold red"}
COUNT = 256
STYLE: dict[str, Any] = {"box": box.SIMPLE, "show_edge": False, "pad_edge": False, "padding": 0}  # fits into 80 columns


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy certify",
        description="Compare the answers of one network in all its formats on real images: base.onnx and base.tflite "
        "of ARTIFACT, fused.onnx and fused.tflite of --fused, PyTorch with --checkpoint. Exit status 0 if every pair "
        "agrees, 1 if one is inaccurate (the same classes, other numbers) or fails (other classes).",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument(
        "--data",
        required=True,
        help="digits, cifar10, cifar100, an .npz file (images or samples, labels), or a folder with one sub-folder per "
        "class",
    )
    p.add_argument("--data-root", type=Path, help="folder of torchvision's CIFAR files")
    p.add_argument(
        "--fused", type=Path, help="folder that a device wrote: fused.onnx, fused.tflite, adapter.safetensors"
    )
    p.add_argument("--checkpoint", type=Path, help="checkpoint folder of the PyTorch network behind the artifact")
    p.add_argument(
        "--count",
        type=int,
        default=COUNT,
        help="how many images, spread over all of them (default: %(default)s; 0: all)",
    )
    p.add_argument(
        "--tolerance",
        type=float,
        help="largest difference in units of max(1, largest logit) (default: the artifact's own for float32, "
        f"{_listed(RELATIVE)})",
    )
    p.add_argument(
        "--agreement",
        type=float,
        help=f"least share of images with the same class (default: {_listed(AGREEMENT)})",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the certificate to FILE too")
    return p


def _listed(defaults: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} for {weights}" for weights, value in defaults.items())


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.count < 0:
        p.error(f"--count must be 0 or more, got {args.count}")
    if args.data_root is not None and not args.data.startswith("cifar"):
        p.error("--data-root goes with cifar10 and cifar100")
    with usage_errors(p):
        Tolerance(args.tolerance or 0, 1 if args.agreement is None else args.agreement)
    found, note = _certified(args)
    if args.json is not None:
        from lorac_runtime.files import atomic_write

        atomic_write(args.json, (json.dumps(found.to_dict() | {"data": args.data}, indent=1) + "\n").encode())
    _show(found, note)
    return 0 if found.certificate.ok else 1


def _certified(args: argparse.Namespace) -> tuple[Certified, str]:
    """The certificate, and why there are no accuracies in it, if so."""
    from lorac_deploy.certificate import certify
    from lorac_runtime import manifest as mf
    from lorac_runtime.tasks import require_classifier

    console = Console(stderr=True)
    manifest = mf.load(args.artifact)
    require_classifier(args.artifact, manifest.task, "a certificate compares classes", "use `lorac-deploy verify`")
    with console.status("reading the images"):
        dataset, note = _images(args, manifest)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing", total=len(dataset))
        found = certify(
            args.artifact,
            dataset.images,
            None if note else dataset.labels,
            fused=args.fused,
            checkpoint=args.checkpoint,
            tolerance=args.tolerance,
            agreement=args.agreement,
            on_images=lambda done: progress.update(task, completed=done),
        )
    return found, note


def _images(args: argparse.Namespace, manifest: Manifest) -> tuple[Dataset, str]:
    """At most ``--count`` images in the network's size, and why their labels are not the network's, if so.

    Test images where the data have some.
    """
    from lorac_deploy.data import has_test_split, load_dataset, with_classes
    from lorac_runtime.errors import DataError

    spec = manifest.input
    size, channels = ((spec.shape[1], spec.shape[2]), spec.shape[0]) if spec.is_image else (None, None)
    dataset = load_dataset(
        args.data,
        split="test" if has_test_split(args.data) else "train",
        size=size,
        channels=channels,
        root=args.data_root,
    )
    if (dataset.shape, dataset.is_image) != (spec.shape, spec.is_image):
        raise DataError(f"{args.data} holds {dataset.key} of shape {dataset.shape}, the network takes {spec.shape}")
    dataset = dataset.select(spread(len(dataset), args.count))
    try:
        return with_classes(dataset, manifest.class_names), ""
    except DataError:
        return dataset, "no accuracies: the data's classes are not the network's"


def _show(found: Certified, note: str) -> None:
    console = Console()
    certificate = found.certificate
    title = f"the same answers? {certificate.images} images"
    table = Table(title=title, **STYLE)
    for heading in ("pair", "max abs", "max rel", "same class", "allowed", "verdict"):
        table.add_column(heading, no_wrap=heading != "verdict")
    for pair in certificate.pairs:
        for output in pair.outputs:
            table.add_row(*_cells(pair, output))
    console.print(table)
    if certificate.accuracies:
        console.print(_accuracies(certificate.accuracies))
    if note:
        console.print(note)
    console.print(_verdict(certificate.ok, [pair.verdict for pair in certificate.pairs]))


def _cells(report: PairReport, output: OutputReport) -> tuple[str, ...]:
    """Of one output, which is named where the network has several."""
    pair, verdict = report.pair, output.verdict(report.pair.tolerance)
    name = f"{pair.reference} - {pair.candidate}" + (f", {output.output}" if len(report.outputs) > 1 else "")
    coloured = f"[{COLOURS[verdict]}]{verdict}[/]"
    allowed = f"{pair.tolerance.relative:g}, {pair.tolerance.agreement:.1%}"
    if output.max_abs is None or output.max_rel is None or output.agreement is None:
        return name, "", "", "", allowed, f"{coloured}: {output.problem}"
    return name, f"{output.max_abs:.1e}", f"{output.max_rel:.1e}", f"{output.agreement:.2%}", allowed, coloured


def _accuracies(accuracies: dict[str, dict[str, float]]) -> Table:
    table = Table("network", "output", "accuracy", **STYLE)
    for model, outputs in accuracies.items():
        for output, share in outputs.items():
            table.add_row(model, output, f"{share:.2%}")
    return table


def _verdict(ok: bool, verdicts: list[Any]) -> str:
    if ok:
        return f"[green]all {len(verdicts)} pairs agree[/]"
    counts = {name: verdicts.count(name) for name in ("inaccurate", "fail")}
    return f"[bold red]NOT certified:[/] {counts['fail']} pairs fail, {counts['inaccurate']} are inaccurate"
