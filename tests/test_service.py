"""The systemd example in docs/device.md: systemd understands it, and so does the command in it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lorac_runtime.cli import parser
from lorac_runtime.cli_parts import NOT_BETTER, STOPPED


@pytest.fixture
def units(root: Path) -> dict[str, str]:
    """The files of the example, by name."""
    page = (root / "docs/device.md").read_text(encoding="utf-8")
    found = re.search(r"```ini\n(.*?)```", page, re.DOTALL)
    assert found is not None
    parts = [part.split("\n", 1) for part in re.split(r"(?m)^# ", found[1])[1:]]
    return {Path(path).name: content for path, content in parts}


def setting(unit: str, name: str) -> str:
    found = re.search(rf"(?m)^{name}=(.*)$", unit)
    assert found is not None
    return found[1]


def complaints(units: dict[str, str], folder: Path) -> str:
    """What systemd says of the units; it ends with 0 even where it ignores a line."""
    for name, content in units.items():
        (folder / name).write_text(content, encoding="utf-8")
    command = ["systemd-analyze", "verify", *(str(folder / name) for name in units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "\n".join(line for line in done.stderr.splitlines() if str(folder) in line) + "!" * done.returncode


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_the_units(units: dict[str, str], tmp_path: Path) -> None:
    assert set(units) == {"adapt.service", "adapt.timer"}
    assert complaints(units, tmp_path) == ""
    units["adapt.timer"] = units["adapt.timer"].replace("OnCalendar=", "OnCalender=")
    assert "OnCalender" in complaints(units, tmp_path)


def test_the_command_understands_its_words_and_its_statuses_are_no_failures(units: dict[str, str]) -> None:
    service = units["adapt.service"]
    words = shlex.split(setting(service, "ExecStart"))
    assert words[0] == "/usr/bin/python3"
    args = parser(artifact=False).parse_args(words[2:])
    assert args.keep_if_better
    assert args.events
    assert setting(service, "SuccessExitStatus").split() == [str(NOT_BETTER), str(STOPPED)]
    assert str(args.out) == f"/var/lib/{setting(service, 'StateDirectory')}"  # which may be written to
