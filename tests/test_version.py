"""The version stands in one place; whatever else tells a version tells that one."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from isolated import run_isolated

import lorac_deploy
import lorac_runtime
from lorac_deploy import cli
from lorac_deploy.commands import export_training_artifact
from lorac_runtime import cli as device_cli
from lorac_runtime import domains_cli, report
from lorac_runtime.fleet import join
from lorac_runtime.version import __version__

SAYS = {
    "lorac-deploy": (cli.main, "lorac-deploy"),
    "export-training-artifact": (export_training_artifact.main, "lorac-deploy"),
    "lorac-finetune": (device_cli.main, "lorac-runtime"),
    "lorac-domains": (domains_cli.main, "lorac-runtime"),
    "lorac-join": (join.main, "lorac-runtime"),
}


def test_the_packages_and_their_metadata_tell_it() -> None:
    assert lorac_deploy.__version__ == lorac_runtime.__version__ == __version__
    installed = {importlib.metadata.version(name) for name in ("lorac-deploy", "lorac-runtime")}
    assert installed == {__version__}, "run `make dev`"
    assert report.versions("engine", "1")["lorac-runtime"] == __version__


def test_every_command_that_is_installed_is_asked() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert {e.name for e in scripts if e.value.startswith("lorac_")} == {*SAYS}


@pytest.mark.parametrize("command", SAYS)
def test_commands_tell_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, distribution = SAYS[command]
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{distribution} {__version__}\n"


def test_a_checkout_tells_it_without_being_installed(root: Path, tmp_path: Path) -> None:
    done = run_isolated([str(root / "runtime" / "ort_finetune.py"), "--version"], tmp_path)
    assert done.stdout == f"lorac-runtime {__version__}\n"


def test_it_stands_in_one_place(root: Path) -> None:
    """No project file says it again."""
    for name in ("pyproject.toml", "runtime/pyproject.toml"):
        text = (root / name).read_text(encoding="utf-8")
        assert re.search(r"^version *=", text, re.MULTILINE) is None
        assert re.search(r"lorac-runtime *==", text) is None
        assert "version.py" in text


def test_the_changelog_begins_with_what_comes_next(root: Path) -> None:
    headings = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    for heading in headings[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading), heading
