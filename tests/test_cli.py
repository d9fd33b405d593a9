"""`lorac-deploy`: the table of commands, their status, and that nothing heavy is loaded for help."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lorac_deploy import cli
from lorac_deploy.cli import COMMANDS, Command, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_parser(name: str) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    assert callable(module.main)
    assert module.parser().prog.endswith(name)


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text and command.summary in text for name, command in COMMANDS.items())


@pytest.mark.parametrize(("argv", "text"), [(["tran"], "'tran' (choose from"), ([], "required: COMMAND")])
def test_a_wrong_command_line_exits_with_2(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_a_command_gets_its_own_options_and_returns_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_command.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "planted", Command("planted_command", ""))
    assert main(["planted", "--help", "-x", "y"]) == 3


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"]])
def test_help_loads_no_framework(argv: list[str], root: Path) -> None:
    code = (
        "import sys\nfrom lorac_deploy.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_runs(root: Path) -> None:
    command = Path(sys.executable).with_name("lorac-deploy")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.startswith("lorac-deploy 0.")
