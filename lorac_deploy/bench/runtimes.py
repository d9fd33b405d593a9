"""Which runtimes an interpreter's environment has, by the distributions installed in it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lorac_runtime.errors import EngineError

SCRIPT = Path(__file__).with_name("environment.py")
RUNTIMES = {  # distribution: (format that it runs, name in tables)
    "onnxruntime": ("onnx", "onnxruntime"),
    "onnxruntime-training-cpu": ("onnx", "onnxruntime-training"),
    "ai-edge-litert": ("tflite", "ai-edge-litert"),
    "tflite-runtime": ("tflite", "tflite-runtime"),
}
PATIENCE = 120  # seconds for an interpreter to say what it has


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A runtime for one format, and the interpreter whose environment has it."""

    name: str
    version: str
    format: str
    interpreter: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def runtimes(interpreters: Sequence[Path]) -> list[Runtime]:
    """The runtimes of these environments, each once.

    Raises EngineError for a path that is no Python interpreter.
    """
    found: dict[tuple[str, str], Runtime] = {}
    for interpreter in interpreters:
        for distribution, version in packages(interpreter).items():
            if distribution in RUNTIMES:
                kind, name = RUNTIMES[distribution]
                found.setdefault((name, version), Runtime(name, version, kind, interpreter))
    return list(found.values())


def packages(interpreter: Path) -> dict[str, str]:
    """Versions of the packages that matter here in an interpreter's environment."""
    try:
        done = subprocess.run(
            [str(interpreter), "-I", str(SCRIPT)], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        described = json.loads(done.stdout)
        found: dict[str, str] = described["packages"]
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError, KeyError, TypeError) as err:
        raise EngineError(
            f"{interpreter} does not answer like a Python interpreter ({type(err).__name__}); expected a path such as "
            ".venv/bin/python"
        ) from err
    return found
