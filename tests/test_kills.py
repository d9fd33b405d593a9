"""A process that is killed wherever it likes: nothing is lost, and the same command comes to the same bytes.

The whole of it, every boundary and hundreds of random kills, is `make test-kills`; here are some of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import write_data
from hand_steps import StepRecipe
from step_artifacts import build_steps
from tiny_network import CLASSES

KILLS = int(os.environ.get("LORAC_KILLS", "5"))  # at random, in each of three attempts
STEP = int(os.environ.get("LORAC_KILL_STEP", "17"))  # operations on files from one kill to the next


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["boundaries", "random"])
def test_killed_at_any_point_and_resumed_it_ends_the_same(how: str, tmp_path: Path) -> None:
    artifact = build_steps(tmp_path / "a", StepRecipe(clip_norm=1.0)).folder
    first = write_data(tmp_path / "first.npz", 300)
    with np.load(first) as file:
        np.savez(tmp_path / "second.npz", images=file["images"], labels=(file["labels"] + 1) % CLASSES)
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("kill_cases.py")
    command = [sys.executable, "-W", "ignore", script, artifact, tmp_path, tmp_path / "work", how, STEP, KILLS, 0]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {"0", "1", "2"}
    kills = sum(max(int(row[2]) for row in rows if row[0] == number) for number in "012")
    assert kills >= 3 * KILLS
    if how == "boundaries":
        assert {row[3] for row in rows if row[0] == "0"} == {"none yet", "in place"}
