"""Help comes at once: asking for it imports no framework."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorac_deploy.cli import COMMANDS

HEAVY = {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "accelerate", "tflite", "sklearn"}
HEAVY |= {"matplotlib", "scipy", "ai_edge_litert"}
ASKED = """
import contextlib, io, json, sys
from lorac_deploy.cli import COMMANDS, main
found = {}
for command in COMMANDS:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([command, "--help"])
    found[command] = [said.getvalue(), sorted({name.split(".")[0] for name in sys.modules})]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list]:
    """By command: what its help says, and the packages imported by then."""
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(found: dict[str, list], command: str) -> None:
    text, packages = found[command]
    assert "options:" in text
    assert not HEAVY & set(packages)
