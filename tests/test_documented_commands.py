"""Every command and every option stands in docs/commands.md, and every command in the README."""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from lorac_deploy.cli import COMMANDS


@pytest.fixture(scope="module")
def generator(root: Path) -> dict[str, Any]:
    """What docs/generate_commands.py defines."""
    return runpy.run_path(str(root / "docs" / "generate_commands.py"))


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The page as it stands in the checkout."""
    return (root / "docs" / "commands.md").read_text(encoding="utf-8")


def undocumented(parsers: dict[str, argparse.ArgumentParser], generator: dict[str, Any], page: str) -> list[str]:
    """Commands without a section, and options that their section lacks."""
    missing = []
    for title, parser in parsers.items():
        _, heading, rest = page.partition(f"## {title}\n")
        section = rest.split("\n## ")[0]
        missing += [] if heading else [title]
        names = [name for action in generator["options"](parser) for name in generator["names"](action)]
        missing += [f"{title}: {name}" for name in names if f"`{name}`" not in section]
    return missing


def test_every_command_and_option_is_documented(generator: dict[str, Any], page: str) -> None:
    assert undocumented(generator["parsers"](), generator, page) == []


def test_an_undocumented_command_or_option_is_found(generator: dict[str, Any], page: str) -> None:
    parsers: dict[str, argparse.ArgumentParser] = generator["parsers"]()
    first = next(iter(parsers))
    parsers[first].add_argument("--planted")
    parsers["lorac-deploy planted"] = argparse.ArgumentParser(add_help=False)
    assert undocumented(parsers, generator, page) == [f"{first}: --planted", "lorac-deploy planted"]


def test_the_page_is_what_make_docs_writes(generator: dict[str, Any], page: str) -> None:
    make_page: Callable[[], str] = generator["page"]
    assert page == make_page(), "run `make docs`"


def test_no_option_lacks_its_help_text(generator: dict[str, Any]) -> None:
    silent = [
        f"{title}: {generator['names'](action)[0]}"
        for title, parser in generator["parsers"]().items()
        for action in generator["options"](parser)
        if not action.help
    ]
    assert silent == []


def test_the_readme_names_every_command(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    scripts = {e.name for e in entry_points(group="console_scripts") if e.value.startswith("lorac_")}
    assert scripts >= {"lorac-deploy", "export-training-artifact", "lorac-finetune"}
    typed = {f"lorac-deploy {name}" for name in COMMANDS if name not in scripts} | scripts
    assert {command for command in typed if command not in readme} == set()


def test_every_make_target_that_the_readme_names_exists(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert {target for target in named if f"\n{target}:" not in makefile} == set()
