"""Commands and programs in pages of documentation: found, run as they are written, or at least parsed.

Everything runs in this process, by the functions that the installed commands call, so that PyTorch is loaded once.
A block that cannot run in a test says so in the page, in a comment on the line before it::

    <!-- parsed by the test: REASON -->      its commands go through their own parsers, no further
    <!-- not run by the test: REASON -->     it is no command of this project; the shell reads it
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BLOCK = re.compile(r"^(?:<!-- (parsed|not run) by the test: ([^\n]+) -->\n)?```(sh|python)\n(.*?)^```$", re.M | re.S)
SCRIPTS = {"runtime/ort_finetune.py": "lorac-finetune", "runtime/ort_domains.py": "lorac-domains"}
SCRIPTS |= {"ort_finetune.py": "lorac-finetune"}  # the same on a device
LAUNCHER = ("accelerate", "launch")
Main = Callable[[list[str]], int]


class Block(NamedTuple):
    """A fenced block. ``mark`` is "", "parsed" or "not run", ``reason`` what the page says about it."""

    mark: str
    reason: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, comments left out; a line that ends with a backslash goes on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


class Parsed(BaseException):
    """Raised in place of doing what a command line says."""


def blocks(page: Path) -> list[Block]:
    """Blocks of shell commands and of Python, in order."""
    return [Block(*map(str, found)) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def command(words: Sequence[str]) -> tuple[Main, list[str]]:
    """What a line calls, and its arguments. KeyError for what is no command of this project."""
    program, *rest = words
    if tuple(words[:2]) == LAUNCHER:  # which starts processes that get the rest of the line
        start = rest.index("-m")
        return module(rest[start + 1]), rest[start + 2 :]
    if program in ("python", "python3"):
        if rest[0] == "-m":
            return module(rest[1]), rest[2:]
        program, *rest = SCRIPTS[rest[0]], *rest[1:]
    (script,) = entry_points(group="console_scripts", name=Path(program).name)
    if not script.value.startswith("lorac_"):
        raise KeyError(f"{program} is no command of this project")
    main: Main = script.load()
    return main, rest


def module(name: str) -> Main:
    """What ``python -m`` calls."""
    if name not in ("benchmarks", "lorac_deploy"):
        raise KeyError(f"python -m {name} is no command of this project")
    main: Main = importlib.import_module("lorac_deploy.cli" if name == "lorac_deploy" else "benchmarks.__main__").main
    return main


def run(block: Block) -> str:
    """Run a block in the current folder; returns what it wrote. AssertionError if a command fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if block.language == "python":
            exec(compile(block.text, "block", "exec"), {"__name__": "__main__"})
        else:
            for words in block.commands:
                status, said = bundle(words) if words[1:] and words[1].endswith(".pyz") else (called(words), "")
                print(said, end="")
                assert status == 0, f"{shlex.join(words)}: {status}\n{printed.getvalue()}"
    return printed.getvalue()


def called(words: Sequence[str]) -> int:
    main, arguments = command(words)
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1


def bundle(words: Sequence[str]) -> tuple[int, str]:
    """A bundle is a program of its own, for any Python."""
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def parsed(words: Sequence[str]) -> bool:
    """Whether the command's own parsers understand its words. Nothing else happens."""
    main, arguments = command(words)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "parse_args", _stopping(argparse.ArgumentParser.parse_args))
        try:
            main(arguments)
        except Parsed:
            return True
        except SystemExit:
            return False
    return False


def _stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args(self: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
        found = parse(self, *given, **named)
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return found  # of `lorac-deploy`: the rest is for a sub-command
        raise Parsed

    return parse_args


def shell_reads(block: Block) -> bool:
    """Whether a shell understands a block of other programs."""
    return subprocess.run(["bash", "-n", "-c", block.text], check=False).returncode == 0


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Work in a folder, as a reader of the page does."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
