"""Every command in every page of docs/ runs as it stands there, or its own parser reads it and the page says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import documented
import pytest
from docs_workspaces import PAGES, Page
from documented import Block, blocks, command, inside, parsed, run, shell_reads
from shared_export import export_graph

RUN_ELSEWHERE = {
    "browser.md": "test_web_page.py",
    "fleet.md": "test_fleet.py",
    "models.md": "test_timm_nets.py",
    "tasks.md": "test_tasks_page.py",
    "tutorial.md": "test_tutorial.py",
}  # by page: the file of tests that runs its blocks
OTHER_PROGRAMS = {"pip", "python3", "python3.11", "source", "sudo", "uname", "scp", "journalctl"}
MARK = "not run"


def pages(root: Path) -> dict[str, list[Block]]:
    """Blocks of commands and programs by page, where there are some."""
    docs = root / "docs"
    found = {str(path.relative_to(docs)): blocks(path) for path in sorted(docs.rglob("*.md"))}
    return {name: those for name, those in found.items() if those}


def test_every_page_with_commands_is_run(root: Path) -> None:
    found = {name for name, those in pages(root).items() if any(not block.mark for block in those)}
    assert found == {page.name for page in PAGES} | RUN_ELSEWHERE.keys()
    for name, tests in RUN_ELSEWHERE.items():
        assert f'"{name}"' in (root / "tests" / tests).read_text(encoding="utf-8")


def test_no_command_hides_from_the_test(root: Path) -> None:
    hidden = re.compile(
        r"^(?:    |```(?:bash|shell|console)\n)(?:\$ )?(?:lorac-|export-training|python -m|accelerate)", re.M
    )
    texts = {path.name: path.read_text(encoding="utf-8") for path in (root / "docs").rglob("*.md")}
    assert {name for name, text in texts.items() if hidden.search(text)} == set()
    assert hidden.search("x\n    lorac-deploy train\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_as_written(page: Page, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorac_deploy.export.export_graph", export_graph)  # all pages have one network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    page.fill(tmp_path)
    with inside(tmp_path):
        for block in blocks(root / "docs" / page.name):
            if not block.mark:
                run(block)


def test_what_is_not_run_is_parsed_and_says_why(root: Path) -> None:
    marked = [(name, block) for name, those in pages(root).items() for block in those if block.mark]
    assert len(marked) > 10
    for name, block in marked:
        assert len(block.reason) > 10, name
        if block.mark == "parsed":
            assert [shlex.join(words) for words in block.commands if not parsed(words)] == [], name
        else:
            assert shell_reads(block), name
            assert {Path(words[0]).name for words in block.commands} <= OTHER_PROGRAMS, name


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        ("lorac-deploy train --data digits --out base/", True),
        ("lorac-deploy train --data digits --out base/ --epoch 3x", False),
        ("lorac-deploy advice artifact/", False),
        ("python -m benchmarks studies blocks --out x", True),
        ("python -m benchmarks studies block --out x", False),
        ("accelerate launch --num_processes 2 -m lorac_deploy train --data cifar10 --out base", True),
        ("lorac-domains store/ switch night --out app/", True),
        ("python3 ort_finetune.py artifact/ --trust key", False),
    ],
)
def test_a_command_with_a_wrong_word_is_noticed(line: str, reads: bool) -> None:
    assert parsed(shlex.split(line)) is reads


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    with inside(tmp_path), pytest.raises(AssertionError, match="verify a b: 1"):
        run(Block("", "", "sh", "lorac-deploy verify a b\n"))
    with inside(tmp_path), pytest.raises(ZeroDivisionError):
        run(Block("", "", "python", "1 / 0\n"))
    for words in (["pip", "install", "x"], ["python", "-m", "pip"], ["python", "other.py"]):
        with pytest.raises((KeyError, ValueError)):
            command(words)


def test_blocks_marks_and_lines_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- not run by the test: far away -->\n```sh\nls \\\n  -l  # all\n\n```\n```python\nx\n```\n")
    assert [(b.mark, b.reason, b.language) for b in blocks(page)] == [(MARK, "far away", "sh"), ("", "", "python")]
    assert blocks(page)[0].commands == [["ls", "-l"]]
    assert documented.shell_reads(blocks(page)[0])
    assert not documented.shell_reads(Block("", "", "sh", "for x in\n"))
