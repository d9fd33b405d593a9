"""The command line of the device: ``python runtime/ort_finetune.py`` or ``lorac-finetune``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lorac_runtime import resume
from lorac_runtime.adapting import adapt
from lorac_runtime.cli_parts import DONE, NOT_BETTER, PROG, STATUSES, add_fields, add_version, ended
from lorac_runtime.cli_state import STATE_COMMANDS, remember, state_main
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.display import Display, Events, Shows, logged_to
from lorac_runtime.gate import GateConfig
from lorac_runtime.session import finetune
from lorac_runtime.state import ATTEMPT
from lorac_runtime.tables import adaptation_json, adaptation_table, figures, table

KEPT = 3  # generations

Bundled = Callable[[Path], Path]

DESCRIPTION = (
    "Fine-tune the model of a training artifact on local images and write OUT/adapter.safetensors, OUT/fused.onnx "
    "(the base file with other numbers in some weights) and OUT/report.json; with --to onnx,tflite OUT/fused.tflite "
    "too. A run that was interrupted goes on after its last checkpoint when the same command is given again; a "
    "finished one is not repeated, but a fused file that is asked for and is not there yet is made from its adapter. "
    "With other images, another artifact or other settings the folder is refused, unless --restart begins anew. "
    "With --keep-if-better OUT keeps a model that is in use: training starts from it, and the result takes its place "
    "only if it is better on held-out samples. See also: status OUT, rollback OUT, resume OUT."
)


def parser(*, artifact: bool = True) -> argparse.ArgumentParser:
    """The command line; its options are the fields of `FinetuneConfig`, of `GateConfig` and a few files."""
    made = argparse.ArgumentParser(prog=PROG, description=DESCRIPTION, epilog=STATUSES)
    add_version(made)
    if artifact:
        made.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    made.add_argument(
        "--data",
        type=Path,
        required=True,
        help=".npz file with images (uint8) and labels, or a folder with one sub-folder of images per class; labels "
        "may be missing where the artifact's method needs none (tent, recalibrate); of another task than "
        "classification an .npz file with the targets of its loss too, of segmentation also a folder of both",
    )
    made.add_argument("--out", type=Path, required=True, help="output folder; created where it is missing")
    made.add_argument("--adapter", type=Path, help="start from this adapter file (default: the artifact's own)")
    add_fields(made, FinetuneConfig)
    _add_gate(made.add_argument_group("keeping a model that is in use"))
    made.add_argument("--nice", type=int, help="lower the priority of the process by so much, 1 to 19")
    made.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    made.add_argument("--events", action="store_true", help="print one JSON object per event, for a service's log")
    made.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    return made


def _add_gate(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--keep-if-better",
        action="store_true",
        help="start from the model in place in OUT, and put the result in its place only if it is better; else the "
        "exit status is 3",
    )
    group.add_argument("--generations", type=int, metavar="N", help="how many models to keep, 1 or more (default: 3)")
    add_fields(group, GateConfig, optional=True)


def main(argv: Sequence[str] | None = None, *, bundled: Bundled | None = None) -> int:
    """Run the command; returns the exit status, one of `STATUSES`.

    ``bundled`` unpacks the artifact that a bundle carries into the output folder; then the command line names none.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in STATE_COMMANDS:
        return state_main(given, lambda words: main(words, bundled=bundled))
    p = parser(artifact=bundled is None)
    args = p.parse_args(given)
    display: Shows = Events(sys.stdout) if args.events else Display(sys.stderr, quiet=args.quiet)
    try:
        config, gate = _settings(args)
    except ValueError as err:
        p.error(str(err))
    with ended(display, lambda: _how_to_go_on(args.out, config)) as end, logged_to(display):
        if args.nice is not None:
            os.nice(args.nice)
        args.artifact = args.artifact if bundled is None else bundled(args.out)
        end.status = _finetuned(args, config, display) if gate is None else _adapted(args, config, gate, display, given)
    return end.status


def _finetuned(args: argparse.Namespace, config: FinetuneConfig, display: Shows) -> int:
    report = finetune(args.artifact, args.data, args.out, config, adapter=args.adapter, on_progress=display.progress)
    _tell(args, report.to_json(), table(report, args.out))
    display.event("finished", **figures(report))
    return DONE


def _adapted(
    args: argparse.Namespace, config: FinetuneConfig, gate: GateConfig, display: Shows, given: list[str]
) -> int:
    keep = KEPT if args.generations is None else args.generations
    found = adapt(
        args.artifact,
        args.data,
        args.out,
        config,
        gate,
        keep=keep,
        on_progress=display.progress,
        on_begin=lambda: remember(args.out, given),
    )
    _tell(args, adaptation_json(found), adaptation_table(found, args.out))
    display.event("judged", generation=found.generation, repeated=found.repeated, **dataclasses.asdict(found.verdict))
    return DONE if found.verdict.accepted else NOT_BETTER


def _tell(args: argparse.Namespace, as_json: str, as_table: str) -> None:
    """The outcome on standard output, for a program or a person; events have their own."""
    if not args.events:
        print(as_json if args.json else as_table, end="")


def _settings(args: argparse.Namespace) -> tuple[FinetuneConfig, GateConfig | None]:
    """What the options say. Raises ValueError for one out of range, and for one that would change nothing."""
    config = FinetuneConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(FinetuneConfig)})
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(GateConfig)}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.events and args.json:
        raise ValueError("--events prints JSON already; leave --json out")
    if args.nice is not None and not 1 <= args.nice <= 19:
        raise ValueError(f"nice must be 1 to 19, got {args.nice}")
    if args.keep_if_better:
        if args.adapter is not None:
            raise ValueError("with --keep-if-better training starts from the model in place; leave --adapter out")
        if args.generations is not None and args.generations < 1:
            raise ValueError(f"generations must be at least 1, got {args.generations}")
        return config, GateConfig(**asked)
    idle = [*asked, *(["generations"] if args.generations is not None else [])]
    if idle:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ValueError(f"{names} would change nothing without --keep-if-better")
    return config, None


def _how_to_go_on(out: Path, config: FinetuneConfig) -> str:
    if not (resume.exists(out) or resume.exists(out / ATTEMPT)):
        return "no checkpoint was written, nothing was kept"
    without = " without --restart" if config.restart else ""
    return f"the same command{without} goes on after the last checkpoint"
