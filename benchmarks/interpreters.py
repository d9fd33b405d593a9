"""Python environments that competitors run in, each with packages that cannot share one.

``project`` is the environment that runs the benchmarks (.venv). The others lie under .envs/bench/ and are made by
``python -m benchmarks setup`` from the pins in benchmarks/environments/; beside each, setup.json says how that went.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "project"
RUNTIME, TRAINING = "onnxruntime", "onnxruntime-training"  # both with this project's runtime
TFLITE_RUNTIME, LITERT = "tflite-runtime", "ai-edge-litert"
PYTORCH, EXECUTORCH = "pytorch", "executorch"
LITERT_TORCH, ONNX2TF, ONNXSIM = "litert-torch", "onnx2tf", "onnxsim"
MADE = (RUNTIME, TRAINING, TFLITE_RUNTIME, LITERT, PYTORCH, EXECUTORCH, LITERT_TORCH, ONNX2TF, ONNXSIM)
NAMES = (PROJECT, *MADE)
DESCRIBE = Path("lorac_deploy") / "bench" / "environment.py"  # standard library alone; prints JSON


@dataclasses.dataclass(frozen=True)
class Installed:
    """What `benchmarks.setup` recorded of an environment."""

    ok: bool
    error: str  # the last telling lines of what failed, empty where all went well
    requirements: str  # sha256 of the file it was made from
    seconds: float
    wheels: Mapping[str, int]  # bytes by "name==version"


def requirements(name: str) -> Path:
    """The file with an environment's pins."""
    return ROOT / "benchmarks" / "environments" / f"{name}.txt"


def digest(name: str) -> str:
    """The sha256 of an environment's pins."""
    return hashlib.sha256(requirements(name).read_bytes()).hexdigest()


def folder(name: str) -> Path:
    """Where an environment lies or will lie."""
    return ROOT / ".envs" / "bench" / name


def interpreter(name: str) -> Path:
    """Where an environment's Python lies or will lie."""
    return folder(name) / "bin" / "python"


def record(name: str) -> Path:
    """The file that says how an environment's installation went."""
    return folder(name) / "setup.json"


def installed(name: str) -> Installed | None:
    """What setup recorded; None where it never ran, or left nothing that can be read."""
    try:
        return Installed(**json.loads(record(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def lacking(name: str) -> str:
    """Why an environment of `MADE` cannot be used, as a note in a results table; empty if it can."""
    found = installed(name)
    if found is not None and not found.ok:
        return f"not installed: {found.error}"
    if found is None or not interpreter(name).exists():
        return f"not installed: there is no environment {name} in {folder(name)}"
    if found.requirements != digest(name):
        return f"outdated: benchmarks/environments/{name}.txt has changed since {folder(name)} was made"
    return ""


def wheel_bytes() -> dict[str, int]:
    """Sizes of all wheels that environments were made from, by "name==version"."""
    found = [installed(name) for name in MADE]
    return {wheel: size for one in found if one is not None for wheel, size in one.wheels.items()}


def python(name: str, given: Mapping[str, Path]) -> Path:
    """The interpreter of an environment: a ``given`` one, or the one that setup made.

    Raises FileNotFoundError with the reason and the command that makes it.
    """
    if name in given:
        if not given[name].exists():
            raise FileNotFoundError(f"--python {name}={given[name]}: there is no such file")
        return given[name]
    if name == PROJECT:
        return Path(sys.executable)
    if reason := lacking(name):
        raise FileNotFoundError(
            f"{reason}; run `python -m benchmarks setup {name}`, or name its interpreter with --python {name}=PATH"
        )
    return interpreter(name)


def described(names: Iterable[str], given: Mapping[str, Path] | None = None) -> dict[str, dict[str, Any]]:
    """What each environment runs on, as its own interpreter says; ``{"error": reason}`` for one that cannot."""
    return {name: _described(name, given or {}) for name in names}


def _described(name: str, given: Mapping[str, Path]) -> dict[str, Any]:
    try:
        command = [str(python(name, given)), "-I", str(ROOT / DESCRIBE)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as err:
        return {"error": str(err)}
    found: dict[str, Any] = json.loads(said)
    return found


def parsed_interpreters(texts: list[str]) -> dict[str, Path]:
    """NAME=PATH of --python options.

    >>> parsed_interpreters(["onnxruntime=/opt/ort/bin/python"])
    {'onnxruntime': PosixPath('/opt/ort/bin/python')}

    Raises ValueError for an unknown name or a text without one.
    """
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, path) in zip(texts, pairs, strict=True) if name not in NAMES or not path]
    if wrong:
        raise ValueError(f"--python wants NAME=PATH with a name of {', '.join(NAMES)}; got {', '.join(wrong)}")
    return {name: Path(path) for name, _, path in pairs}
