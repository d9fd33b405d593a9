"""`lorac-deploy plan ARTIFACT --memory SIZE`: what a device with so much memory can train."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_runtime.config import size_in_bytes

if TYPE_CHECKING:
    from lorac_exporters.memory_plan import Fit, MemoryPlan


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy plan",
        description="Say which ways to train the network of ARTIFACT fit into a device's memory, from computed peaks "
        "of the engine onnxruntime (images that the program holds not counted), and how to get the one recommended. "
        "Exit status 1 if nothing fits.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument("--memory", required=True, metavar="SIZE", help="what the process may take, such as 256MB or 1GiB")
    p.add_argument("--batch-size", type=int, help="images per step (default: the artifact's)")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    with usage_errors(p):
        budget = size_in_bytes(args.memory)
    if args.batch_size is not None and args.batch_size < 1:
        p.error(f"--batch-size must be at least 1, got {args.batch_size}")
    from lorac_exporters.memory_plan import plan_memory

    plan = plan_memory(args.artifact, budget, batch=args.batch_size)
    if args.json:
        print(json.dumps(_as_dict(plan), indent=1))
    else:
        _show(plan, args.artifact)
    return 0 if plan.best else 1


def _as_dict(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "budget": plan.budget,
        "batch_size": plan.batch,
        "recommended": plan.fits.index(plan.best) if plan.best else None,
        "choices": [
            {
                "what": _label(fit),
                "rank": None if fit.choice is None else fit.choice.rank,
                "export_options": None if fit.choice is None else fit.choice.options,
                "finetune_options": _finetune_options(plan, fit),
                "trained_parameters": fit.trained,
                "images_at_once": fit.at_once,
                "peak": fit.peak.total,
                "peak_parts": dataclasses.asdict(fit.peak),
                "storage": fit.storage,
            }
            for fit in plan.fits
        ],
        "refused": dict(plan.refused),
    }


def _label(fit: Fit) -> str:
    return "now (as exported)" if fit.choice is None else fit.choice.label


def _named(fit: Fit) -> str:
    rank = None if fit.choice is None else fit.choice.rank
    return _label(fit) + ("" if rank is None else f", rank {rank}")


def _finetune_options(plan: MemoryPlan, fit: Fit) -> list[str]:
    """What to give ort_finetune.py; nothing where the choice does not fit."""
    if not fit.at_once:
        return []
    pieces = [] if fit.at_once == plan.batch else ["--micro-batch", str(fit.at_once)]
    return ["--batch-size", str(plan.batch), *pieces]


def _show(plan: MemoryPlan, artifact: Path) -> None:
    table = Table(title=f"{artifact}: batches of {plan.batch} in {_mb(plan.budget)}")
    for column in ("what trains", "rank", "parameters", "at once", "peak", "saved", "files"):
        table.add_column(column, justify="left" if column == "what trains" else "right")
    for fit in plan.fits:
        rank = "" if fit.choice is None or fit.choice.rank is None else str(fit.choice.rank)
        bytes_ = (_mb(count) for count in (fit.peak.total, fit.peak.saved, fit.storage))
        cells = (_label(fit), rank, f"{fit.trained:,}", _at_once(plan, fit), *bytes_)
        table.add_row(*cells, style="bold green" if fit is plan.best else "" if fit.at_once else "dim")
    console = Console()
    console.print(table)
    for label, reason in plan.refused:
        console.print(f"left out: {label}: {reason}", soft_wrap=True, markup=False)
    for line in _advice(plan, artifact):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _at_once(plan: MemoryPlan, fit: Fit) -> str:
    """How many images of a batch are computed together."""
    return f"{fit.at_once} of {plan.batch}" if fit.at_once else "no fit"


def _advice(plan: MemoryPlan, artifact: Path) -> list[str]:
    best = plan.best
    if best is None:
        least = plan.smallest
        alone = f"; Python and onnxruntime alone take {_mb(least.peak.process)}"
        return [f"nothing fits: the least is {_mb(least.peak.total)}, for {_named(least)}{alone}"]
    lines = [f"recommended: {_named(best)}, a peak of {_mb(best.peak.total)}"]
    if best.choice is not None:
        lines.append(f"  export-training-artifact ... {' '.join(best.choice.options)} --bn frozen --engine onnxruntime")
    return [*lines, f"  python runtime/ort_finetune.py {artifact} ... {' '.join(_finetune_options(plan, best))}"]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
