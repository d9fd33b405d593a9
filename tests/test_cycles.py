"""Adapt, accept, roll back, again and again: memory and the folder do not grow. `make test-kills` makes 1,000."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from finetune_runs import write_data
from hand_steps import StepRecipe
from step_artifacts import build_steps

CYCLES = int(os.environ.get("LORAC_CYCLES", "40"))
GROWTH = 4 << 20  # bytes that the second half may add to what the first half took

CYCLE = """
import json, sys
from pathlib import Path
from lorac_runtime import state as states
from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig

artifact, data, state = map(Path, sys.argv[1:4])
config = FinetuneConfig(epochs=3, lr=0.3, batch_size=60, threads=1, restart=True)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

seen = []
for cycle in range(int(sys.argv[4])):
    found = adapt(artifact, data, state, config, keep=3)
    assert found.verdict.accepted, found.verdict
    assert found.generation == cycle + 1
    assert states.rollback(state) == (cycle + 1, 0)
    seen.append((resident(), len(list(state.rglob("*"))), sum(p.stat().st_size for p in state.rglob("*"))))
print(json.dumps(seen))
"""


def test_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    artifact = build_steps(tmp_path / "a", StepRecipe()).folder
    data = write_data(tmp_path / "local.npz", 300)
    command = [sys.executable, "-c", CYCLE, artifact, data, tmp_path / "state", CYCLES]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory, files, sizes = zip(*json.loads(done.stdout), strict=True)
    half = CYCLES // 2
    print(f"{CYCLES} cycles: {memory[half] / 1e6:.1f} MB after half of them, {memory[-1] / 1e6:.1f} MB in the end")
    assert max(memory[half:]) - max(memory[:half]) < GROWTH
    assert set(files[1:]) == {files[1]}
    assert max(sizes[1:]) - min(sizes[1:]) < 200  # digits of numbers and times in JSON
