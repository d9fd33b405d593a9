"""A power cut takes what was not flushed to the disk: nothing that is needed may be missing then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import write_data
from hand_steps import StepRecipe
from step_artifacts import build_steps
from tiny_network import CLASSES

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what was flushed")


def watched(folder: Path, *words: str) -> list[str]:
    """What was wrong in the attempts that kill_cases.py kills; the last line tells how many renames were seen."""
    artifact = build_steps(folder / "a", StepRecipe(clip_norm=1.0)).folder
    with np.load(write_data(folder / "first.npz", 300)) as file:
        np.savez(folder / "second.npz", images=file["images"], labels=(file["labels"] + 1) % CLASSES)
    script = Path(__file__).with_name("durable.py")
    command = [sys.executable, "-W", "ignore", script, artifact, folder, folder / "state", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_all_is_flushed_before_it_is_relied_on(tmp_path: Path) -> None:
    *problems, seen = watched(tmp_path)
    assert not problems
    assert int(seen.split()[0]) > 50


def test_the_watch_sees_what_is_not_flushed(tmp_path: Path) -> None:
    *problems, _ = watched(tmp_path, "forget")
    assert any("is renamed, but" in line for line in problems)
    assert any("is removed, but" in line for line in problems)
    assert any("in the end" in line for line in problems)
