"""What `export-training-artifact` says in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lorac_deploy.commands._tflite import tflite_rows
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import Manifest

if TYPE_CHECKING:  # it imports all that exports
    from lorac_exporters.artifact import ExportReport


def show(report: ExportReport, *, list_changes: bool) -> None:
    """Print what an export wrote, and what stays frozen."""
    manifest = report.manifest
    share = manifest.trained_parameters / manifest.model_parameters
    size = sum(f.nbytes for f in manifest.files.values()) / 1e6
    changes = "" if list_changes or not report.changes else " (--list-changes shows them)"
    table = Table(show_header=False, title=f"training artifact {report.folder}")
    table.add_row("model", f"{manifest.model}, {manifest.model_parameters:,} parameters")
    table.add_row("trains", f"{manifest.trained_parameters:,} parameters ({share:.2%})")
    fixed = " (lora_a frozen)" if fixed_tensors(manifest.adapters, manifest.trainables) else ""
    parts = f", some channels of {len(manifest.partials)} layers" if manifest.partials else ""
    trained = f"{len(manifest.adapters)} adapters{fixed}{parts}"
    table.add_row("method", f"{manifest.method}, {trained}, BN {manifest.bn_policy}")
    if manifest.additions is not None:
        table.add_row("added", str(manifest.additions))
    table.add_row("input", f"{manifest.input.name} {manifest.input.shape}, {_answers(manifest)}")
    if manifest.task is not None:
        targets = ", ".join(
            f"{t.name} {t.dtype} ({', '.join(map(str, ('N', *t.shape)))})" for t in manifest.task.targets
        )
        table.add_row("data", f"{manifest.input.key} and {targets or 'nothing else'}; loss {manifest.training.loss}")
    table.add_row("files", f"{size:.1f} MB in all, base.onnx {manifest.files['base.onnx'].nbytes / 1e6:.1f} MB")
    table.add_row("base.tflite", _tflite_text(report))
    for name, text in () if report.tflite is None else tflite_rows(report.tflite):
        table.add_row("", f"{name}: {text}")
    table.add_row("base.onnx", f"{len(report.changes)} differences from the model given{changes}")
    table.add_row("time", f"{report.seconds:.1f} s")
    console = Console()
    console.print(table)
    if report.tflite is None:
        console.print(f"no base.tflite: {report.no_tflite}", soft_wrap=True, markup=False)
    for change in report.changes if list_changes else ():
        console.print(f"changed: {change}", soft_wrap=True, markup=False)
    for layer, reason in report.frozen:
        console.print(f"frozen: {layer}: {reason}", soft_wrap=True, markup=False)


def _answers(manifest: Manifest) -> str:
    """What comes out, in words."""
    if manifest.task is None:
        return f"{manifest.output.classes} classes"
    outputs = ", ".join(f"{output.name} {output.shape}" for output in manifest.task.outputs)
    return f"{manifest.task.kind}: {outputs}"


def _tflite_text(report: ExportReport) -> str:
    return "none, see below" if report.tflite is None else f"{report.tflite.nbytes / 1e6:.1f} MB"
