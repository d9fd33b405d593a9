"""The benchmarks' environments: pinned, made or reported, and looked up with the reason where one lacks."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import interpreters as envs
from benchmarks import setup

GOOD, BAD = envs.LITERT, envs.TFLITE_RUNTIME  # names only: what the tests install is none of these


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout with two requirement files and no environments."""
    monkeypatch.setattr(envs, "ROOT", tmp_path)
    for name, pin in ((GOOD, "tiny==1.0"), (BAD, "tiny==9.0")):
        envs.requirements(name).parent.mkdir(parents=True, exist_ok=True)
        envs.requirements(name).write_text(f"# for a test\n{pin}\n")
    return tmp_path


def borrowed(name: str) -> None:
    """This interpreter in the place of an environment's, for one where nothing can be installed anyway."""
    envs.interpreter(name).parent.mkdir(parents=True)
    envs.interpreter(name).symlink_to(sys.executable)


def recorded(name: str, *, ok: bool = True, error: str = "") -> None:
    """What setup would leave of an environment."""
    borrowed(name)
    found = envs.Installed(ok, error, envs.digest(name), 1.0, {})
    envs.record(name).write_text(json.dumps(dataclasses.asdict(found)))


@pytest.mark.parametrize("name", ["interpreters", "setup"])
def test_examples_in_docstrings_hold(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert (tried.attempted > 0, tried.failed) == (True, 0)


def test_every_environment_has_a_file_of_pins_and_a_check() -> None:
    files = {path.stem for path in envs.requirements(GOOD).parent.glob("*.txt")}
    assert files == set(envs.MADE) == set(setup.CHECKS)


@pytest.mark.parametrize("name", envs.MADE)
def test_a_file_of_pins_says_what_it_is_for_and_pins_every_package(name: str) -> None:
    text = envs.requirements(name).read_text()
    assert text.startswith("# ")
    pins, editable = setup.parsed_requirements(text)
    assert all(pin.count("==") == 1 and not set(pin) & set("<>~*;@ ") for pin in pins)
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins) > 0
    assert all((envs.ROOT / folder / "pyproject.toml").is_file() for folder in editable)


def test_environments_that_train_with_this_projects_runtime_have_it_from_the_checkout() -> None:
    for name in (envs.RUNTIME, envs.TRAINING):
        assert setup.parsed_requirements(envs.requirements(name).read_text())[1] == ["./runtime"]


def test_an_environment_that_was_never_made_is_named_with_the_command(bare: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no environment {GOOD}.*run `python -m benchmarks setup {GOOD}`"):
        envs.python(GOOD, {})


def test_one_that_could_not_be_installed_gives_its_reason(bare: Path) -> None:
    recorded(GOOD, ok=False, error="ERROR: no wheel")
    assert envs.lacking(GOOD) == "not installed: ERROR: no wheel"
    with pytest.raises(FileNotFoundError, match="ERROR: no wheel"):
        envs.python(GOOD, {})


def test_one_whose_pins_have_changed_is_outdated(bare: Path) -> None:
    recorded(GOOD)
    assert envs.python(GOOD, {}) == envs.interpreter(GOOD)
    envs.requirements(GOOD).write_text("# for a test\ntiny==2.0\n")
    with pytest.raises(FileNotFoundError, match=f"outdated: benchmarks/environments/{GOOD}.txt has changed"):
        envs.python(GOOD, {})


def test_a_record_that_cannot_be_read_counts_as_none(bare: Path) -> None:
    recorded(GOOD)
    envs.record(GOOD).write_text('{"ok": true')
    assert "there is no environment" in envs.lacking(GOOD)


def test_a_given_interpreter_wins_and_must_exist(bare: Path) -> None:
    assert envs.python(GOOD, {GOOD: Path(sys.executable)}) == Path(sys.executable)
    assert envs.python(envs.PROJECT, {}) == Path(sys.executable)
    with pytest.raises(FileNotFoundError, match=f"--python {GOOD}=nowhere/python"):
        envs.python(GOOD, {GOOD: Path("nowhere/python")})


def test_environments_describe_themselves_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "lacking", lambda name: "not installed: no wheel")
    found = envs.described([envs.PROJECT, GOOD, BAD], {BAD: Path("/bin/false")})
    assert found[envs.PROJECT]["python"] == sys.version.split()[0]
    assert "torch" in found[envs.PROJECT]["packages"]
    assert "no wheel" in found[GOOD]["error"]
    assert "error" in found[BAD]


def tiny_wheel(folder: Path) -> None:
    """A wheel of a package ``tiny`` with nothing in it."""
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")


def test_setup_makes_what_can_be_made_and_reports_the_rest(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_wheel(bare)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(bare))
    monkeypatch.setattr(setup, "CHECKS", dict.fromkeys((GOOD, BAD), "import tiny"))
    real = setup.bare_environment
    monkeypatch.setattr(setup, "bare_environment", lambda name: real(name) if name == GOOD else borrowed(name))
    assert setup.main([BAD, GOOD]) == 1
    assert f"not installed: {BAD}: fetching: ERROR: " in capsys.readouterr().err
    assert "tiny==9.0" in envs.lacking(BAD)
    assert envs.lacking(GOOD) == ""
    subprocess.run([envs.python(GOOD, {}), "-c", "import tiny"], check=True)
    assert envs.wheel_bytes() == {"tiny==1.0": (bare / "tiny-1.0-py3-none-any.whl").stat().st_size}
    assert setup.main([GOOD]) == 0
    assert f"{GOOD}: in place" in capsys.readouterr().out
    monkeypatch.setattr(setup, "CHECKS", {GOOD: "import other"})
    assert not setup.in_place(GOOD)


def test_setup_refuses_a_name_that_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        setup.main(["bench-ort"])
    assert "no environment bench-ort: choose from onnxruntime" in " ".join(capsys.readouterr().err.split())
