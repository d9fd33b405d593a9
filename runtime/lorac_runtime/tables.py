"""Outcomes of runs, for a person as a table, for a program as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lorac_runtime.adapting import Adaptation
from lorac_runtime.manifest import ADAPTER
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import CacheReport, FinetuneReport
from lorac_runtime.tasks import CUSTOM

_LONG = ("losses", "run")  # fields of a report that an event leaves out


def figures(report: FinetuneReport) -> dict[str, Any]:
    """What an event says of a finished run."""
    return {name: value for name, value in dataclasses.asdict(report).items() if name not in _LONG}


def adaptation_json(found: Adaptation) -> str:
    """The outcome of an attempt, with the run's report where it was accepted."""
    return json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n"


def adaptation_table(found: Adaptation, state: Path) -> str:
    """The outcome of an attempt for a person."""
    verdict = found.verdict
    outcome = f"generation {found.generation} is in place in {state}"
    rows = [("accepted" if verdict.accepted else "not better", outcome)]
    rows += [("because", reason) for reason in verdict.reasons]
    if verdict.before is not None and verdict.after is not None and verdict.gain_low is not None:
        gain = f"{verdict.before:.1%} before, {verdict.after:.1%} after, on {verdict.held_out} held-out samples"
        rows.append(("accuracy", f"{gain}; a gain of at least {100 * verdict.gain_low:.1f} points"))
    if verdict.anchors_before is not None and verdict.anchors_after is not None:
        rows.append(("anchors", f"{verdict.anchors_before:.1%} before, {verdict.anchors_after:.1%} after"))
    rows += [("repeated", "this very attempt was made before, nothing was done")] if found.repeated else []
    return "".join(f"{name:12}{text}\n" for name, text in rows)


def table(report: FinetuneReport, out: Path) -> str:
    """The figures of a run for a person, a line each."""
    share = report.trained_parameters / report.model_parameters
    memory = "unknown" if report.peak_memory_bytes is None else f"{report.peak_memory_bytes / 2**20:.0f} MiB"
    rows = {
        **_quality(report),
        "loss": _losses(report),
        "trained": f"{report.trained_parameters:,} of {report.model_parameters:,} parameters ({share:.2%})",
        "samples": f"{report.train_images} for training, {report.val_images} held out",
        "time": f"{report.seconds:.1f} s" + (f", a step {1e3 * report.step_seconds:.1f} ms" if report.losses else ""),
        "memory": memory,
        **({} if report.cache is None else {"cache": _cache(report.cache)}),
        "written": ", ".join(str(out / name) for name in (ADAPTER, *(f.name for f in report.fused), REPORT)),
    }
    return "".join(f"{name:10}{text}\n" for name, text in rows.items())


def _cache(cache: CacheReport) -> str:
    return (
        f"{cache.hit_rate:.1%} of {cache.hits + cache.misses:,} look-ups answered; {cache.stored} of {cache.samples} "
        f"samples in {cache.nbytes / 1e6:.1f} MB"
    )


def _losses(report: FinetuneReport) -> str:
    if report.epoch_losses:
        return f"{report.epoch_losses[0]:.4f} in the first epoch, {report.epoch_losses[-1]:.4f} in the last"
    if report.loss_before is None or report.loss_after is None:
        return "not measured: no samples were held out"
    return f"{report.loss_before:.4f} before, {report.loss_after:.4f} after, on held-out samples; nothing trained"


def _quality(report: FinetuneReport) -> dict[str, str]:
    """How well the network answers held-out samples, by what its task is measured with."""
    on = f"on {report.val_images} held-out samples"
    if report.error_before is not None and report.error_after is not None:
        return {"error": f"{report.error_before:.4g} before, {report.error_after:.4g} after, mean absolute, {on}"}
    if report.mean_iou_before is not None and report.mean_iou_after is not None:
        overlap = f"{report.mean_iou_before:.3f} before, {report.mean_iou_after:.3f} after, {on}"
        return {"mean IoU": overlap, "accuracy": f"{_accuracies(report)} by pixel"}
    if report.accuracy_before is None and report.task == CUSTOM and report.loss_before is not None:
        return {"held out": f"loss {report.loss_before:.4f} before, {report.loss_after:.4f} after, {on}"}
    return {"accuracy": _accuracies(report)}


def _accuracies(report: FinetuneReport) -> str:
    before, after = report.accuracy_before, report.accuracy_after
    if before is None or after is None:
        return f"not measured: no {'labels' if report.val_images else 'samples were held out'}"
    return f"{before:.1%} before, {after:.1%} after, on {report.val_images} held-out samples"
