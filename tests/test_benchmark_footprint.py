"""The footprint benchmark: what is installed is what metadata says, imports are those of a fine-tuning."""

from __future__ import annotations

import doctest
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from small_artifacts import NAMES, SPEC, export

from benchmarks import footprint, footprint_probe
from benchmarks import interpreters as envs
from benchmarks.footprint_devices import DEVICES, NATIVE, OURS, PLAIN, Device
from benchmarks.rows import Row, check_unique

HERE = Path(sys.executable)
QUICK = footprint.Settings.smallest({})
# Runs one of the import statements, then a fine-tuning; prints the packages' modules that only the latter imported.
LATER = """
import sys
exec(sys.argv[1])
from lorac_runtime.cli import main
before = set(sys.modules)
status = main(sys.argv[2:])
tops = ("lorac_runtime", "onnxruntime", "numpy", "safetensors", "torch", "onnx")
print([status, *sorted(m for m in {*sys.modules} - before if m.split(".")[0] in tops)])
"""


def test_examples_in_docstrings_hold() -> None:
    tried = doctest.testmod(footprint_probe)
    assert (tried.attempted > 0, tried.failed) == (True, 0)


def probed(*roots: str) -> dict[str, dict[str, int] | list[str]]:
    command = [sys.executable, "-I", str(footprint.PROBE), *roots]
    said: dict[str, dict[str, int] | list[str]] = json.loads(subprocess.check_output(command))
    return said


def test_a_closure_has_what_is_required_here_and_nothing_else() -> None:
    def names(*roots: str) -> set[str]:
        return {release.split("==")[0] for release in probed(*roots)["releases"]}

    assert names("rich") == {"rich", "pygments", "markdown-it-py", "mdurl"}
    assert names("lorac-runtime") == {"lorac-runtime", "numpy", "safetensors"}
    assert {"pytest", "hypothesis"} < names("lorac-runtime[test]")
    assert "setuptools" not in names("torch")


def test_what_is_not_installed_is_named() -> None:
    assert probed("mdurl", "no-such-distribution>=2")["missing"] == ["no-such-distribution>=2"]


def test_a_distribution_counts_with_all_of_its_files() -> None:
    package = Path(str(importlib.metadata.distribution("mdurl").locate_file("mdurl")))
    folders = [package, *package.parent.glob("mdurl-*.dist-info")]
    expected = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    assert [*footprint.installed(device(roots=("mdurl",)), HERE).values()] == [expected]


def test_an_editable_one_counts_with_its_sources(root: Path) -> None:
    sources = sum(file.stat().st_size for file in (root / "runtime" / "lorac_runtime").rglob("*.py"))
    (nbytes,) = (v for k, v in footprint.installed(device(roots=("lorac-runtime",)), HERE).items() if "lorac" in k)
    assert sources < nbytes < 6 * sources


def device(variant: str = OURS, environment: str = envs.PROJECT, **fields: object) -> Device:
    return Device(**{"roots": ("mdurl",), "code": "import json", **fields}, variant=variant, environment=environment)  # type: ignore[arg-type]


def test_imports_are_processes_less_an_empty_one_of_the_same_round() -> None:
    codes = {"little": (HERE, "pass"), "much": (HERE, "x = bytearray(80_000_000)")}
    found = footprint.imports(codes, 2)
    assert [len(found["much"].whole), len(found["much"].peaks), len(found["little"].seconds)] == [2, 2, 2]
    assert min(found["much"].peaks) > max(found["little"].peaks) + 75e6
    assert found["much"].empty == found["little"].empty
    assert found["much"].seconds == [a - b for a, b in zip(found["much"].whole, found["much"].empty, strict=True)]


def test_an_import_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"import no_such_module.*ModuleNotFoundError"):
        footprint.process(HERE, "import no_such_module")


@pytest.fixture(scope="module")
def found() -> Iterator[list[Row]]:
    """Rows of three devices, one of them not installed."""
    devices = (
        device(),
        device("more", roots=("rich",), code="import json, doctest", note="a remark"),
        device("absent", envs.EXECUTORCH),
        device("broken", code="import no_such_module"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "DEVICES", devices)
        patch.setattr(envs, "lacking", lambda name: "not installed: no wheel")
        patch.setattr(envs, "wheel_bytes", lambda: dict.fromkeys(footprint.installed(devices[0], HERE), 9))
        said: list[str] = []
        yield footprint.rows(QUICK, said.append)
    assert any("more: there" in line for line in said)


def test_every_device_has_all_rows_or_a_reason(found: list[Row]) -> None:
    check_unique(found)
    rows = {(row.variant, row.quantity): row for row in found}
    assert set(rows) == {(name, q) for name in (OURS, "more", "absent", "broken") for q in footprint.UNITS}
    assert all("no wheel" in rows["absent", q].note for q in footprint.UNITS)
    assert all("no_such_module" in rows["broken", q].note for q in footprint.UNITS)
    installed = rows["more", "installed"]
    assert installed.figure == sum(installed.details["releases"].values())
    assert installed.ratio == pytest.approx(installed.figure / (rows[OURS, "installed"].figure or 0))
    assert (rows[OURS, "installed"].ratio, installed.reference, installed.note) == (None, OURS, "a remark")
    assert rows["more", "resident after import"].figure > (rows[OURS, "resident after import"].figure or 0) > 5e6


def test_a_wheel_that_setup_did_not_record_is_not_made_up(found: list[Row]) -> None:
    ours, more = (row for row in found if row.quantity == "wheel" and row.variant in (OURS, "more"))
    assert (ours.figure, more.figure) == (9, None)
    assert "no wheel of" in more.note
    assert "pygments==" in more.note


def test_devices_run_in_environments_that_exist() -> None:
    assert DEVICES[0].variant == OURS
    assert {one.environment for one in DEVICES} <= set(envs.NAMES)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    export(folder / "artifact", engine="both")
    labels = np.arange(24) % len(NAMES)
    images = np.random.default_rng(0).integers(0, 256, (24, *SPEC.shape[1:], SPEC.shape[0]), dtype=np.uint8)
    np.savez(folder / "local.npz", images=images, labels=labels)
    return folder


@pytest.mark.parametrize(("engine", "code"), [("onnxruntime", PLAIN), ("onnxruntime-training", NATIVE)])
def test_our_imports_are_all_that_a_fine_tuning_needs(artifact: Path, engine: str, code: str) -> None:
    options = ["--data", "local.npz", "--epochs", "1", "--engine", engine, "--to", "onnx,tflite", "--out", engine]
    command = [sys.executable, "-I", "-c", LATER, code, "artifact", *options]
    done = subprocess.run(command, cwd=artifact, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[0]"], done.stderr


def test_wrong_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = footprint.main
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds counts from 1, got 0" in capsys.readouterr().err
