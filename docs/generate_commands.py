"""Write docs/commands.md from the commands' own parsers: `make docs`. A test compares the two."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

PAGE = Path(__file__).with_name("commands.md")
INTRODUCTION = """\
# Commands

Written by `make docs` from the commands' own parsers. All have `--help`; `lorac-finetune`, `lorac-domains`,
`export-training-artifact` and `lorac-deploy` itself have `--version`. Exit status: 0 done, 1 failed (one message on
stderr), 2 wrong command line. `verify` exits with 1 if the file is not a drop-in, `certify` if two formats answer
differently, `bench` if a fused file is not as fast as its base, and with 3 if the machine is too noisy to tell.
`lorac-finetune` has some more ([device.md](device.md)).
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command line of the project, by what a user types."""
    from lorac_deploy.cli import COMMANDS
    from lorac_runtime.cli import parser as finetune
    from lorac_runtime.cli_state import STATE_COMMANDS, state_parser
    from lorac_runtime.domains_cli import parsers as domains
    from lorac_runtime.fleet.join import parser as join

    found = {"python runtime/ort_finetune.py (or lorac-finetune)": finetune()}
    for action in STATE_COMMANDS:
        found[f"python runtime/ort_finetune.py {action} (or lorac-finetune {action})"] = state_parser(action)
    for action, its in domains().items():
        found[f"python runtime/ort_domains.py STORE {action} (or lorac-domains STORE {action})"] = its
    found["lorac-join"] = join()
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        own: argparse.ArgumentParser = module.parser()
        found[f"lorac-deploy {name}" + (f" (or {own.prog})" if own.prog == name else "")] = own
    return found


def page() -> str:
    """The whole of docs/commands.md."""
    return "\n".join([INTRODUCTION, *(_section(title, parser) for title, parser in parsers().items())])


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Positional arguments and options of a parser; `--help` and `--version`, which all have, left out."""
    return [action for action in parser._actions if not {"--help", "--version"} & {*action.option_strings}]


def names(action: argparse.Action) -> list[str]:
    """What a user types for an option, or the name of a positional argument."""
    return list(action.option_strings) or [(action.metavar or action.dest).upper()]


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    rows = [f"| {_call(action)} | {_help(action, parser.prog)} |" for action in options(parser)]
    return "\n".join([f"## {title}", "", parser.description or "", "", "| option | |", "|---|---|", *rows, ""])


def _call(action: argparse.Action) -> str:
    text = ", ".join(f"`{name}`" for name in names(action))
    if action.choices is not None:
        text += " " + " / ".join(f"`{choice}`" for choice in action.choices)
    return text + (" (required)" if action.required and action.option_strings else "")


def _help(action: argparse.Action, prog: str) -> str:
    return ((action.help or "") % {**vars(action), "prog": prog}).replace("|", "\\|").replace("\n", "<br>")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
