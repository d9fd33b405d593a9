"""`lorac-finetune status | rollback | resume STATE`: looking after a state folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lorac_runtime.cli_parts import PROG, STATUSES, ended
from lorac_runtime.display import Display
from lorac_runtime.errors import OutputError, StateError
from lorac_runtime.files import atomic_write, output_folder, size_of
from lorac_runtime.state import Kept, Status, rollback, status

COMMAND = "command.json"
MAX_BYTES = 1 << 20
STATE_COMMANDS = {
    "status": "Show what a state folder holds: the generation in place, those before it, and what is unfinished.",
    "rollback": "Put the generation before the one in place, or another one, in its place.",
    "resume": "Give the command again that worked on the state folder last: go on where it stopped.",
}

Main = Callable[[list[str]], int]


def state_parser(name: str) -> argparse.ArgumentParser:
    """The command line of one of `STATE_COMMANDS`."""
    made = argparse.ArgumentParser(prog=f"{PROG} {name}", description=STATE_COMMANDS[name], epilog=STATUSES)
    made.add_argument("state", type=Path, help="folder that --out of a run with --keep-if-better named")
    if name == "status":
        made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if name == "rollback":
        made.add_argument("--to", type=int, metavar="NUMBER", help="the generation to put in place")
    return made


def state_main(argv: Sequence[str], again: Main) -> int:
    """Run ``argv``, which begins with the name of the command; ``again`` runs the words of a whole command line."""
    name, *words = argv
    args = state_parser(name).parse_args(words)
    with ended(Display(sys.stderr, quiet=False), lambda: "nothing was changed") as end:
        if name == "status":
            found = status(args.state)
            print(json.dumps(dataclasses.asdict(found), indent=1) if args.json else status_table(found), end="")
        elif name == "rollback":
            before, now = rollback(args.state, args.to)
            print(f"generation {now} is in place again; before it was {before}")
        else:
            end.status = _resumed(args.state, again)
    return end.status


def remember(state: Path, argv: Sequence[str]) -> None:
    """Keep a command line, for `resume`, which goes on and does not begin anew. Raises OutputError."""
    content = {"folder": str(Path.cwd()), "words": [word for word in argv if word != "--restart"]}
    atomic_write(output_folder(state) / COMMAND, (json.dumps(content, indent=1) + "\n").encode())


def _resumed(state: Path, again: Main) -> int:
    folder, words = _remembered(state / COMMAND)
    words += ["--out", str(state.resolve())]  # whatever the file says, and wherever the state was moved to
    try:
        os.chdir(folder)
    except OSError as err:
        raise OutputError(f"{folder}, where the command was given, cannot be entered: {err.strerror}") from err
    return again(words)


def _remembered(path: Path) -> tuple[str, list[str]]:
    try:
        size_of(path, MAX_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
        folder, words = content["folder"], content["words"]
    except FileNotFoundError as err:
        raise StateError(f"{path} not found: no run with --keep-if-better was begun there") from err
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as err:
        raise StateError(f"{path} cannot be read: {err}") from err
    if not isinstance(folder, str) or not all(isinstance(word, str) for word in words) or words[:1] == ["resume"]:
        raise StateError(f"{path} does not hold a command line")
    return folder, words


def status_table(found: Status) -> str:
    """A state for a person: a line per generation, then what is unfinished.

    >>> print(status_table(Status(None, (), ("onnx",), None, ("too hard",))), end="")
    no generation is in place
    the last attempt was not accepted: too hard
    """
    lines = [_kept_line(kept, current=kept.number == found.current) for kept in found.kept]
    lines += [] if found.current is not None else ["no generation is in place"]
    lines += [] if found.unfinished is None else [f"an attempt is unfinished, after step {found.unfinished}"]
    lines += [f"the last attempt was not accepted: {reason}" for reason in found.rejected]
    return "".join(f"{line}\n" for line in lines)


def _kept_line(kept: Kept, *, current: bool) -> str:
    mark = "in place" if current else ""
    if kept.problem:
        return f"generation {kept.number:<4} {mark:9} {kept.problem}"
    origin = "the artifact's own model" if kept.parent is None else f"from {kept.parent}"
    accuracy = "" if kept.accuracy is None else f", {kept.accuracy:.1%} on held-out samples when it was accepted"
    return f"generation {kept.number:<4} {mark:9} {kept.nbytes / 1e6:.1f} MB, {origin}{accuracy}"
