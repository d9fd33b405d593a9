"""A disk that is full, or becomes read-only, at any moment: clear words, nothing lost, and the same call goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import build
from finetune_runs import write_data
from tiny_network import Recipe


def _namespaces() -> bool:
    tool = shutil.which("unshare")
    probe = ["-rm", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/mnt"]
    return tool is not None and subprocess.run([tool, *probe], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="needs user and mount namespaces")
def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    artifact = build(tmp_path / "a", Recipe(clip_norm=0.0)).folder
    data = write_data(tmp_path / "local.npz", 300)
    script = Path(__file__).with_name("full_disk.py")
    command = ["unshare", "-rm", sys.executable, str(script), str(artifact), str(data), str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind in ("refused early", "full in between"):
        *failed, last = found[kind]
        assert last == ""
        assert len(failed) > 5
        assert all("pace" in text for text in failed), [text for text in failed if "pace" not in text]
    assert len(set(found["full in between"])) > 3  # at several places, not one
    assert all("ead-only" in text for text in found["read-only"]), found["read-only"]
