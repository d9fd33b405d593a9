"""docs/tutorial.md runs as it is written, and what it shows is what one sees."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import BLOCK, Block, inside, run

PAGE = "tutorial.md"
OUTPUT = re.compile(r"\n```text\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")
FRAMES = re.compile("[\u2500-\u257f\\s]+")


def steps(text: str) -> Iterator[tuple[Block, str]]:
    """Each block with the output that the page shows for it, or ""."""
    found = list(BLOCK.finditer(text))
    for block in found:
        shown = OUTPUT.match(text, block.end() + 1)
        yield Block(*map(str, block.groups(default=""))), shown[1] if shown else ""


def skeleton(text: str) -> list[str]:
    """Lines without frames, and with # for each number."""
    lines = (FRAMES.sub(" ", NUMBER.sub("#", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.slow
def test_the_tutorial_runs_as_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = list(steps((root / "docs" / "tutorial.md").read_text(encoding="utf-8")))
    assert sum(1 for _, shown in found if shown) == 6
    assert [block.mark for block, _ in found] == ["not run", *[""] * (len(found) - 1)]
    with inside(tmp_path):
        for block, shown in found[1:]:
            lines = skeleton(run(block))
            assert [line for line in skeleton(shown) if line not in lines] == [], block.text
    report = json.loads((tmp_path / "adapted" / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy_before"] < 0.3
    assert report["accuracy_after"] > 0.6


def test_an_output_that_is_not_what_one_sees_is_noticed() -> None:
    ((block, shown),) = steps("```python\nprint('made 3 of 4')\n```\n\n```text\n│ made 5 of 7 │\n```\n")
    assert skeleton(shown) == skeleton(run(block)) == ["made # of #"]
    assert skeleton("done 4") != skeleton(run(block))
