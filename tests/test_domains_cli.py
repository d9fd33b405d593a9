"""`lorac-domains`: what a user types and sees, and that its files are those of the fine-tuning runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import build
from finetune_runs import contents, write_data
from tiny_network import Recipe

from lorac_runtime import FinetuneConfig, domains_cli, finetune

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact and two fine-tuning runs, ``day`` and ``night``."""
    home = tmp_path_factory.mktemp("domains")
    build(home / "artifact", Recipe(clip_norm=0.0))
    for seed, name in enumerate(("day", "night")):
        data = write_data(home / f"{name}.npz", count=12, seed=seed)
        finetune(home / "artifact", data, home / name, FinetuneConfig(epochs=1, seed=seed, val_fraction=0.0))
    return home


@pytest.fixture
def run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on a store in ``tmp_path`` and returns (status, stdout, stderr); the inputs stay as they are."""
    before = contents(trained)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = domains_cli.main([str(tmp_path / "store"), *map(str, arguments)])
        except SystemExit as usage:
            status = int(str(usage.code))
        assert contents(trained) == before
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def filled(run: Run, trained: Path) -> Run:
    """The command, on a store that holds both domains."""
    assert run("create", "--artifact", trained / "artifact")[0] == 0
    for name in ("day", "night"):
        assert run("add", name, "--adapter", trained / name / "adapter.safetensors")[0] == 0
    return run


def test_a_domain_s_file_is_the_one_that_its_fine_tuning_wrote(filled: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("day", "night", "day"):
        status, stdout, stderr = filled("switch", name, "--out", tmp_path / "app")
        assert (status, stderr) == (0, "")
        assert stdout == f"{name} is in use; written: {tmp_path / 'app' / 'fused.onnx'}\n"
        assert (tmp_path / "app" / "fused.onnx").read_bytes() == (trained / name / "fused.onnx").read_bytes()
    assert filled("switch", "base", "--out", tmp_path / "app")[0] == 0
    assert (tmp_path / "app" / "fused.onnx").read_bytes() == (trained / "artifact" / "base.onnx").read_bytes()


def test_the_list_shows_all_domains_and_the_one_in_use(filled: Run, trained: Path, tmp_path: Path) -> None:
    assert filled("list")[1].splitlines()[-1] == "none is in use"
    filled("switch", "night", "--out", tmp_path / "app")
    status, stdout, stderr = filled("list")
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert [line[:7].split()[-1] for line in lines[:3]] == ["base", "day", "night"]
    assert [line[0] for line in lines[:3]] == [" ", " ", "*"]
    nbytes = (trained / "day" / "adapter.safetensors").stat().st_size
    assert f"{nbytes:,} bytes" in lines[1]
    assert "729 parameters  lora-c" in lines[1]
    assert lines[3] == f"in use: night, in {tmp_path / 'app'} (onnx)"
    found = json.loads(filled("list", "--json")[1])
    assert found["artifact"] == str(trained / "artifact")
    assert found["current"]["name"] == "night"
    assert [(d["name"], d["nbytes"], d["current"]) for d in found["domains"]] == [
        ("base", 0, False),
        ("day", nbytes, False),
        ("night", nbytes, True),
    ]


def test_replacing_and_deleting(filled: Run, trained: Path, tmp_path: Path) -> None:
    other = trained / "night" / "adapter.safetensors"
    filled("switch", "day", "--out", tmp_path / "app")
    assert filled("add", "day", "--adapter", other)[0] == 1
    status, stdout, _ = filled("add", "day", "--adapter", other, "--replace")
    assert (status, stdout.splitlines()[-1]) == (0, "it is in use: switch to it again for its new files")
    assert "replaced since: switch again" in filled("list")[1]
    status, _, stderr = filled("delete", "day")
    assert status == 1
    assert stderr.startswith("error: day is in use: its files lie in")
    assert filled("delete", "day", "--force")[:2] == (0, "day is deleted\n")
    assert filled("fuse", "night", "--out", tmp_path / "other")[0] == 0
    assert contents(tmp_path / "other") == {"fused.onnx": (trained / "night" / "fused.onnx").read_bytes()}
    assert filled("list")[1].splitlines()[-1] == "none is in use"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("add", "../x", "--adapter", "DAY"), 2, "cannot be the name of a domain"),
        (("switch", "day", "--out", "OUT", "--to", "onnx,coreml"), 2, "expected one or more of onnx, tflite"),
        (("switch", "day"), 2, "--out"),
        (("paint", "day"), 2, "invalid choice"),
        ((), 2, "ACTION"),
        (("switch", "dusk", "--out", "OUT"), 1, "error: "),
        (("switch", "day", "--out", "OUT", "--to", "tflite"), 1, "has no base.tflite"),
        (("add", "dusk", "--adapter", "OUT"), 1, "cannot be read"),
        (("delete", "base"), 1, "it has no file, and stays"),
        (("create", "--artifact", "OUT"), 1, "is not a training artifact folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_changes_nothing(
    filled: Run, trained: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, text: str
) -> None:
    before = contents(tmp_path)
    places = {"OUT": tmp_path / "app", "DAY": trained / "day" / "adapter.safetensors"}
    found, stdout, stderr = filled(*(places.get(word, word) for word in arguments))
    assert (found, stdout) == (status, "")
    assert text in stderr
    assert contents(tmp_path) == before


def test_without_a_store_the_message_says_how_to_make_one(run: Run) -> None:
    for arguments in (("list",), ("delete", "day")):
        status, _, stderr = run(*arguments)
        assert status == 1
        assert "make one: create --artifact" in stderr


def test_a_cut_off_switch_is_shown(filled: Run, tmp_path: Path) -> None:
    filled("switch", "day", "--out", tmp_path / "app")
    record = tmp_path / "store" / "store.json"
    record.write_text(record.read_text().replace('"complete": true', '"complete": false'))
    assert filled("list")[1].splitlines()[-1] == f"a switch to day in {tmp_path / 'app'} was cut off: switch again"


def test_an_interruption_has_its_own_status(filled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "disk_usage", interrupted)
    status, _, stderr = filled("switch", "day", "--out", tmp_path / "app")
    assert status == 130
    assert "the same command goes on" in stderr
    assert contents(tmp_path / "app") == {}


def test_a_full_disk_is_told_before_anything_is_written(
    filled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    status, _, stderr = filled("switch", "day", "--out", tmp_path / "app")
    assert status == 1
    assert "of free space" in stderr
    assert contents(tmp_path / "app") == {}


def test_the_script_needs_no_engine(filled: Run, root: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[0] = 'ort_domains.py'\n"
        f"try: runpy.run_path({str(root / 'runtime' / 'ort_domains.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'onnxruntime', 'onnx', 'torch'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, tmp_path / "store", "switch", "day", "--out", tmp_path / "app"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("day is in use")
    assert list(domains_cli.parsers()) == ["create", "list", "add", "switch", "fuse", "delete"]
