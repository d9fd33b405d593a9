"""`lorac-deploy advise ARTIFACT --data FILE`: which method and block suit this drift."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from lorac_deploy.advise import DEFAULT_METHODS, TRIAL_STEPS
from lorac_deploy.commands._common import guarded
from lorac_deploy.commands._options import names
from lorac_deploy.commands._progress import counted
from lorac_deploy.commands._tables import standard_output
from lorac_exporters.methods import METHODS

if TYPE_CHECKING:
    from lorac_deploy.advise.advice import Advice


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy advise",
        description="Choose what to train for the drift in local data: gradient norms rank the blocks of ARTIFACT's "
        "network, short trials on a part of the data decide. Everything that was done is shown; OUT gets the artifact "
        "of the chosen method, ready for a device, and OUT.json beside it says what was found.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument("--data", type=Path, required=True, help="labelled local data, as for fine-tuning")
    p.add_argument("--out", type=Path, help="folder of the chosen artifact (default: ARTIFACT-advised)")
    p.add_argument(
        "--methods",
        type=names,
        default=DEFAULT_METHODS,
        metavar="NAME[,NAME...]",
        help=f"methods to try (default: {','.join(DEFAULT_METHODS)})",
    )
    p.add_argument("--rank", type=int, default=4, help="of adapters (default: %(default)s)")
    p.add_argument(
        "--trial-steps",
        type=int,
        default=TRIAL_STEPS,
        metavar="N",
        help="training steps of a trial, at most: fewer take less time and tell less (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="of splits and of adapters' start (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        p.error(f"--methods: {', '.join(unknown)} is not one of {', '.join(METHODS)}")
    if args.trial_steps < 1:
        p.error(f"--trial-steps must be at least 1, got {args.trial_steps}")
    from lorac_deploy.advise.advice import advise, export_choice
    from lorac_deploy.advise.trial import Trial
    from lorac_exporters.artifact_folder import check_replaceable
    from lorac_exporters.plan import LoraConfig

    out = args.out or args.artifact.with_name(f"{args.artifact.name}-advised")
    check_replaceable(out)
    with counted("reading") as told:
        advice = advise(
            args.artifact,
            args.data,
            methods=args.methods,
            lora=LoraConfig(rank=args.rank, seed=args.seed),
            trial=Trial(seed=args.seed, steps=args.trial_steps),
            on_progress=told,
        )
        told("writing the chosen artifact", 0, None)
        export_choice(args.artifact, advice, out)
    out.with_name(f"{out.name}.json").write_text(advice.to_json(), encoding="utf-8")
    if args.json:
        print(advice.to_json(), end="")
    else:
        _show(advice, out)
    return 0


def _show(advice: Advice, out: Path) -> None:
    console = standard_output()
    if advice.scores:
        told = ", ".join(f"{word} {score:.2f}" for word, score in advice.scores.items())
        console.print(f"relative gradients of the blocks: {told}", soft_wrap=True)
    else:
        console.print(f"no blocks: {advice.no_blocks}", soft_wrap=True, markup=False)
    console.print(_table(advice))
    for label, why in advice.refused:
        console.print(f"left out: {label}: {why}", soft_wrap=True, markup=False)
    chosen = advice.chosen
    console.print(f"chosen: {chosen.candidate.label}: {advice.reason}", soft_wrap=True, markup=False)
    console.print(f"  {' '.join(chosen.candidate.options)}", soft_wrap=True, markup=False)
    console.print(f"{out}: its artifact; {out}.json: all of this", soft_wrap=True, markup=False)


def _table(advice: Advice) -> Table:
    title = f"{advice.samples} samples, {advice.epochs} epochs"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in (
        "what trains",
        "parameters",
        "trials",
        "held-out\n%",
        "gain",
        "G multiply-\nadds",
        "time",
        "peak\nMB",
    ):
        table.add_column(column, justify="left" if column == "what trains" else "right", no_wrap=True)
    for option in advice.options:
        s = option.score
        found = (f"{100 * s.accuracy:.1f}", f"{100 * s.gain:+.1f}") if s.failed is None else ("diverged", "")
        costs = (f"{option.work / 1e9:,.1f}", f"{option.seconds:,.1f} s", f"{option.peak / 1e6:,.0f}")
        style = "bold green" if option is advice.chosen else ""
        table.add_row(option.candidate.label, f"{option.trained:,}", str(len(s.after)), *found, *costs, style=style)
    return table
