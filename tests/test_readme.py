"""The README's blocks run as they are written, top to bottom, in a folder that looks like a checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

LANGUAGES = ("sh", "python")
FRAMEWORKS = {"torch", "onnx", "onnx_ir", "onnxscript", "h5py", "sympy", "tensorflow", "torchvision"}
RECORDER = """  # every Python that a block starts runs this first
import atexit, json, os, sys

def record():
    modules = sorted({name.split(".")[0] for name in sys.modules})
    with open(os.environ["RECORD"], "a", encoding="utf-8") as file:
        print(json.dumps({"program": os.path.basename(sys.argv[0]), "modules": modules}), file=file)

atexit.register(record)
"""


class Block(NamedTuple):
    """A fenced block: its language and text."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks with a language, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def is_make(block: Block) -> bool:
    """Whether a block only names make targets: continuous integration runs those."""
    return block.language == "sh" and all(line.startswith("make ") for line in block.text.splitlines())


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in ``folder`` with this environment's commands; prompts in Python make it a doctest."""
    if block.language == "sh":
        command = ["bash", "-eu", "-o", "pipefail", "-c", block.text]
    elif ">>>" in block.text:
        (folder / "block.txt").write_text(block.text, encoding="utf-8")
        command = [sys.executable, "-m", "doctest", "block.txt"]
    else:
        command = [sys.executable, "-c", block.text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # OMP_NUM_THREADS stays 1 as in all tests: PyTorch's threads wait for each other by spinning, and so two of them
    # beside another test take several times the work of one.
    (folder / "recorder").mkdir(exist_ok=True)
    (folder / "recorder" / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")
    own = {"PATH": path, "PYTHONPATH": str(folder / "recorder"), "RECORD": str(folder / "record.jsonl")}
    return subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)


def loaded(folder: Path, program: str) -> list[set[str]]:
    """Top-level packages that each run of ``program`` in the blocks had loaded when it ended."""
    lines = (folder / "record.jsonl").read_text(encoding="utf-8").splitlines()
    return [set(entry["modules"]) for entry in map(json.loads, lines) if entry["program"] == program]


@pytest.fixture
def workspace(root: Path, tmp_path: Path) -> Path:
    """What the README takes for granted: the checkout's `runtime` and `.venv`, and a user's own ONNX file."""
    (tmp_path / "runtime").symlink_to(root / "runtime")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    )
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    images, batch = torch.zeros(2, 3, 32, 32), torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's exporter about PyTorch
        program = torch.onnx.export(net, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(tmp_path / "any_cnn.onnx")
    return tmp_path


@pytest.mark.slow
def test_the_readme_runs_as_written(root: Path, workspace: Path) -> None:
    found = blocks((root / "README.md").read_text(encoding="utf-8"))
    assert {block.language for block in found} == set(LANGUAGES)
    for block in found:
        if not is_make(block):
            done = run(block, workspace)
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (workspace / "adapted" / "fused.onnx").stat().st_size == (
        workspace / "artifact" / "base.onnx"
    ).stat().st_size
    devices = loaded(workspace, "ort_finetune.py")
    assert len(devices) == 2
    for device in devices:
        assert {"lorac_runtime", "onnxruntime", "numpy", "safetensors"} <= device
        assert device & FRAMEWORKS == set()
    cached = json.loads((workspace / "adapted_rear" / "report.json").read_text(encoding="utf-8"))
    assert cached["cache"]["hits"] > 0
    report = json.loads((workspace / "adapted" / "report.json").read_text(encoding="utf-8"))
    assert report["engine"] == "onnxruntime"


def test_a_framework_that_a_block_loads_is_noticed(tmp_path: Path) -> None:
    assert run(Block("sh", "echo 'import h5py' > a.py\necho 'import json' > b.py\n"), tmp_path).returncode == 0
    (tmp_path / "h5py.py").touch()
    assert run(Block("sh", "python a.py\npython b.py\n"), tmp_path).returncode == 0
    assert loaded(tmp_path, "a.py")[0] & FRAMEWORKS == {"h5py"}
    assert loaded(tmp_path, "b.py")[0] & FRAMEWORKS == set()


@pytest.mark.parametrize(
    "block",
    [Block("sh", "false\ntrue\n"), Block("python", ">>> 1 + 1\n3\n"), Block("python", "raise SystemExit(1)\n")],
    ids=["shell", "doctest", "program"],
)
def test_a_block_that_fails_is_noticed(block: Block, tmp_path: Path) -> None:
    assert run(block, tmp_path).returncode != 0


def test_blocks_are_found_and_make_is_left_to_ci() -> None:
    text = "a\n```sh\nmake demo  # x\nmake test\n```\nb\n```python\n>>> 1\n1\n```\n```sh\nls\n```\n"
    found = blocks(text)
    assert [block.language for block in found] == ["sh", "python", "sh"]
    assert [is_make(block) for block in found] == [True, False, False]
