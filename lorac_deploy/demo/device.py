"""A device's environment: another Python, with the runtime and one engine, and without PyTorch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

from lorac_deploy.demo import evaluate
from lorac_runtime.errors import EngineError

ABSENT = "No module named 'torch'"
INSTALLERS = frozenset(
    {"pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils"}
)  # a device can do without


@dataclasses.dataclass(frozen=True)
class Device:
    """An engine, the Python that has it, the folder below the demo's that its results go to, and formats to fuse."""

    engine: str
    python: Path
    folder: str
    formats: str = "onnx"


def require_no_torch(python: Path) -> None:
    """Raise EngineError unless ``python`` works, has `lorac_runtime`, and cannot import torch."""
    advice = "`make device-env` creates .envs/device and .envs/device-training"
    try:
        runtime = run(python, ["-c", "import lorac_runtime"])
    except OSError as err:
        raise EngineError(f"{python} cannot be run ({err.strerror}); {advice}") from err
    if runtime.returncode:
        raise EngineError(f"{python} has no lorac_runtime; {advice}")
    if ABSENT not in run(python, ["-c", "import torch"]).stderr:
        raise EngineError(f"{python} has PyTorch, so it cannot stand for a device; {advice}")


def accuracy(python: Path, model: Path, artifact: Path, data: Path) -> float:
    """Accuracy of ``model`` on ``data`` in plain onnxruntime, in a process of the device's environment.

    Raises EngineError with the process's message if it fails.
    """
    done = run(python, [evaluate.__file__, *map(str, (model, artifact, data))])
    if done.returncode:
        raise EngineError(f"evaluating {model} failed:\n{done.stderr.strip()}")
    return float(done.stdout)


def installed_bytes(python: Path) -> int:
    """Size of the environment of ``python``: all files below its folder but those of pip and setuptools."""
    files = (path for path in python.parent.parent.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if not _installs(path))


def _installs(path: Path) -> bool:
    """Whether a file of an environment belongs to what installs packages.

    >>> _installs(Path("e/lib/python3.11/site-packages/pip-24.0.dist-info/RECORD"))
    True
    >>> _installs(Path("e/lib/python3.11/site-packages/numpy/pip.py"))
    False
    """
    parts = path.parts
    if "site-packages" not in parts:
        return False
    return parts[parts.index("site-packages") + 1].split("-")[0] in INSTALLERS


def environment() -> dict[str, str]:
    """This process's environment variables without those that would lend its packages to another Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(python: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``python`` with its own packages only, and keep what it prints."""
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, env=environment(), check=False)
