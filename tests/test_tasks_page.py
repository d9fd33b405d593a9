"""The examples of docs/tasks.md run as they are written, with fewer images and steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_readme import Block, blocks, run

SMALL = [
    (r"IMAGES = 160", "IMAGES = 6"),
    (r"IMAGES, STEPS = 400, 300", "IMAGES, STEPS = 16, 2"),
    (r"--epochs \d+", "--epochs 1"),
]


def smaller(text: str) -> str:
    for pattern, replacement in SMALL:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.fixture(scope="module")
def page(root: Path) -> list[Block]:
    return blocks((root / "docs" / "tasks.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("which", ["segmentation", "detector"])
def test_the_examples_run(page: list[Block], tmp_path: Path, which: str) -> None:
    chosen = page[:2] if which == "segmentation" else page[2:]
    assert len(page) == 5
    for block in chosen:
        done = run(Block(block.language, smaller(block.text)), tmp_path)
        assert done.returncode == 0, f"{block.text}\n{done.stderr}"
    out = tmp_path / ("adapted" if which == "segmentation" else "adapted_street")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["task"] == ("segmentation" if which == "segmentation" else "custom")
    assert {"fused.onnx", "fused.tflite"} <= {path.name for path in out.iterdir()}
    if which == "detector":
        assert re.search(r"adapted_street/fused\.onnx: [\d.]+% of objects found", done.stdout)


def test_the_page_is_made_smaller_by_every_replacement(page: list[Block]) -> None:
    text = "".join(block.text for block in page)
    assert all(re.search(pattern, text) for pattern, _ in SMALL)
