"""Importing onnxruntime: without frameworks, and with a clear word where it is missing, too old or another build."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from isolated import run_isolated

from lorac_runtime.engines import wheel
from lorac_runtime.errors import EngineError

LOAD = """
import sys
from lorac_runtime.engines import wheel
from lorac_runtime.errors import EngineError
try:
    found = wheel.load()
    print(found.version, found.api.Module.__name__)
except EngineError as err:
    print(err)
"""


INFERENCE = LOAD.replace("wheel.load()", "wheel.load_inference()").replace(
    "found.version, found.api.Module.__name__", "found.__version__, 'onnxruntime.training' in sys.modules"
)


def loaded(packages: Path, root: Path, code: str = LOAD) -> str:
    """Output of ``code`` where only numpy, safetensors and what lies in ``packages`` are installed."""
    done = run_isolated(["-c", code], packages, path=[root / "runtime"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake(packages: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = packages / "onnxruntime" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_missing_wheel_gives_the_pip_command(tmp_path: Path, root: Path) -> None:
    text = loaded(tmp_path, root)
    assert "pip install onnxruntime-training-cpu==1.19.2" in text


def test_plain_onnxruntime_is_told_from_the_training_build(tmp_path: Path, root: Path) -> None:
    fake(tmp_path, {"__init__.py": "__version__ = '1.31.1'", "capi/__init__.py": ""})
    text = loaded(tmp_path, root)
    assert "is plain onnxruntime, which cannot train by itself" in text
    assert "use an artifact with the engine onnxruntime" in text
    assert "cannot share an environment" in text
    assert "pip install onnxruntime-training-cpu==1.19.2" in text


def test_a_plain_build_written_over_the_training_build_is_noticed(tmp_path: Path, root: Path) -> None:
    files = {
        "__init__.py": "__version__ = '1.31.1'",
        "capi/__init__.py": "",
        "capi/_pybind_state.py": "Session = 1",
        "training/api/__init__.py": "",
    }
    fake(tmp_path, files)
    assert "cannot share an environment" in loaded(tmp_path, root)


def test_a_wheel_that_does_not_load_gives_the_reason(tmp_path: Path, root: Path) -> None:
    fake(tmp_path, {"__init__.py": "raise ImportError('GLIBC_2.99 not found')", "training/api/__init__.py": ""})
    text = loaded(tmp_path, root, LOAD + "\nprint('onnxruntime.training' in sys.modules)")
    assert "does not load: GLIBC_2.99 not found" in text
    assert text.endswith("False\n")  # the stand-in is gone, so a later attempt starts clean


def test_for_inference_a_missing_package_gives_the_pip_command(tmp_path: Path, root: Path) -> None:
    text = loaded(tmp_path, root, INFERENCE)
    assert "the engine onnxruntime needs a package that is not installed here" in text
    assert "pip install lorac-runtime[onnxruntime]" in text
    assert "cannot share an environment" in text


@pytest.mark.parametrize("version", ["1.17.0", "1.31.1", "2.0"])
def test_for_inference_the_plain_build_will_do(tmp_path: Path, root: Path, version: str) -> None:
    fake(tmp_path, {"__init__.py": f"__version__ = '{version}'"})
    assert loaded(tmp_path, root, INFERENCE) == f"{version} False\n"  # and no stand-in stays behind


@pytest.mark.parametrize("version", ["'1.16.3'", "'0.9'", "None", "'main'"])
def test_for_inference_an_old_package_is_refused(tmp_path: Path, root: Path, version: str) -> None:
    fake(tmp_path, {"__init__.py": f"__version__ = {version}"})
    text = loaded(tmp_path, root, INFERENCE)
    assert f"is onnxruntime {version.strip(chr(39))}, the engine onnxruntime needs 1.17 or newer" in text
    assert "pip install --upgrade lorac-runtime[onnxruntime]" in text


def test_for_inference_a_package_that_does_not_load_gives_the_reason(tmp_path: Path, root: Path) -> None:
    fake(tmp_path, {"__init__.py": "raise ImportError('GLIBC_2.99 not found')"})
    text = loaded(tmp_path, root, INFERENCE + "\nprint('onnxruntime.training' in sys.modules)")
    assert "does not load: GLIBC_2.99 not found" in text
    assert text.endswith("False\n")


@pytest.mark.parametrize(
    ("python", "system", "machine", "reason"),
    [
        ((3, 13), "linux", "x86_64", True),
        ((3, 11), "linux", "aarch64", True),
        ((3, 11), "linux", "x86_64", False),
        ((3, 12), "win32", "AMD64", False),
        ((3, 12), "darwin", "arm64", False),
    ],
)
def test_where_pip_finds_no_build_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, python: tuple[int, int], system: str, machine: str, reason: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        wheel.load()
    assert ("it has no build for Python" in str(caught.value)) == reason
    assert not reason or machine in str(caught.value)


AFTER = """
import os, sys
from lorac_runtime.engines import wheel
first = wheel.load()
assert wheel.load().api is first.api
print(os.environ["ORT_DISABLE_TELEMETRY"], *{m.split(".")[0] for m in sys.modules} & {"torch", "onnx", "sympy", "h5py"})
from onnxruntime.training import artifacts
print(hasattr(artifacts, "generate_artifacts"))
"""


def test_the_wheel_loads_alone_and_does_not_stand_in_the_way_of_the_exporter() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1", "True"]


BOTH = AFTER.replace("wheel.load()\n", "wheel.load()\nassert wheel.load_inference() is first.ort\n", 1)
INFERENCE_FIRST = AFTER.replace("first = ", "plain = wheel.load_inference()\nfirst = ").replace(
    "print(os", "assert plain is first.ort\nprint(os"
)


@pytest.mark.parametrize("code", [BOTH, INFERENCE_FIRST])
def test_both_engines_share_the_training_build_and_load_no_framework(code: str) -> None:
    assert code != AFTER
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1", "True"]


def test_a_package_that_was_imported_whole_is_used_as_it_is() -> None:
    import onnxruntime.training.api  # in this process, beside whatever other tests imported

    assert wheel.load().api is onnxruntime.training.api
