"""Checkpoints of an unfinished run: whole or absent, wherever the process dies."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

from lorac_runtime import resume
from lorac_runtime.engines import Engine
from lorac_runtime.errors import CheckpointError, EngineError, OutputError
from lorac_runtime.training import Evaluation, History

RUN = {"artifact": "a", "epochs": "3"}


class TextEngine:
    """An engine whose whole state is a text."""

    name, version = "text", "1"

    def __init__(self, text: str = "") -> None:
        self.text = text

    def train_step(self, images: object, labels: object, lr: float) -> float:
        raise NotImplementedError

    def eval_step(self, images: object, labels: object) -> tuple[float, np.ndarray]:
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        raise NotImplementedError

    def recalibrate(self, batches: Iterable[np.ndarray]) -> None:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        (folder / "state").write_text(self.text)

    def restore(self, folder: Path) -> None:
        self.text = (folder / "state").read_text()


class BrokenEngine(TextEngine):
    """One that stops while it writes."""

    def save(self, folder: Path) -> None:
        (folder / "state").write_text(self.text[:1])
        raise EngineError("no space left")


def history(epoch: int) -> History:
    return History(epoch, (1.5,) * epoch, (1.5,) * epoch, (0.1,) * epoch, 2.5, Evaluation(0.75, 0.5))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    resume.save(tmp_path, TextEngine("two"), RUN, history=history(2))
    engine: Engine = TextEngine()
    assert resume.load(tmp_path, engine, RUN) == history(2)
    assert engine.text == "two"
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-1", "step-2"]
    resume.save(tmp_path, TextEngine("three"), RUN, history=history(3))
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-2", "step-3"]


def test_another_engine_goes_on_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    other = TextEngine()
    with caplog.at_level(logging.INFO):
        resume.load(tmp_path, other, RUN)
        assert caplog.text == ""
        other.name = "other"
        assert resume.load(tmp_path, other, RUN) == history(1)
    assert "the engine other goes on from a checkpoint of text" in caplog.text


def test_no_run_and_a_discarded_one_load_as_none(tmp_path: Path) -> None:
    assert resume.load(tmp_path, TextEngine(), RUN) is None
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    assert resume.exists(tmp_path)
    resume.discard(tmp_path)
    assert not resume.exists(tmp_path)
    assert resume.load(tmp_path, TextEngine(), RUN) is None
    assert list(tmp_path.iterdir()) == []
    resume.discard(tmp_path)


def test_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    with pytest.raises(CheckpointError, match=r"(?s)artifact: 'a' before, 'b' now.*seed: None before, '1' now"):
        resume.load(tmp_path, TextEngine(), {"artifact": "b", "epochs": "3", "seed": "1"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema: 1, this runtime reads 3"),
        ({"history": None}, "history: expected an object"),
        ({"more": 1}, "more: unknown key"),
        ({"engine": "other"}, "was altered"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    path = tmp_path / "checkpoint" / "step-1" / "resume.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        resume.load(tmp_path, TextEngine(), RUN)


def test_altered_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    state = tmp_path / "checkpoint" / "step-1" / "state"
    state.write_text("eno")
    with pytest.raises(CheckpointError, match=r"is damaged \(state\)"):
        resume.load(tmp_path, TextEngine(), RUN)
    state.unlink()
    with pytest.raises(CheckpointError, match=r"is damaged \(state\)"):
        resume.load(tmp_path, TextEngine(), RUN)


@pytest.mark.parametrize("damage", ["state", "resume.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for epoch, text in enumerate(("one", "two", "six"), start=1):
        resume.save(tmp_path, TextEngine(text), RUN, history=history(epoch))
    (tmp_path / "checkpoint" / "step-3" / damage).write_text("xis")
    engine = TextEngine()
    assert resume.load(tmp_path, engine, RUN) == history(2)
    assert engine.text == "two"
    assert "going on from the checkpoint before it" in caplog.text
    resume.save(tmp_path, TextEngine("six"), RUN, history=history(3))  # in the place of the damaged one
    assert resume.load(tmp_path, engine, RUN) == history(3)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    resume.save(tmp_path, TextEngine("one"), RUN, history=history(1))
    with pytest.raises(OutputError, match="could not be written"):
        resume.save(tmp_path, BrokenEngine("two"), RUN, history=history(2))
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-1"]
    assert resume.load(tmp_path, TextEngine(), RUN) == history(1)


DYING = """
import os, sys
from pathlib import Path
from test_resume import RUN, TextEngine, history
from lorac_runtime import resume

os.fsync = lambda handle: None  # slow, and without effect on what another process sees
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "half written"}

class SlowEngine(TextEngine):
    def save(self, folder):
        (folder / "state").write_text(self.text[:3])
        sys.audit("half written")
        super().save(folder)

def die_before(count):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        seen += event in WATCHED
        if seen > count:
            os._exit(9)
    sys.addaudithook(hook)

def child(out, count):
    pid = os.fork()
    if pid == 0:
        die_before(count)
        for epoch in (1, 2, 3):
            resume.save(out, SlowEngine(f"state {epoch}"), RUN, history=history(epoch))
        resume.discard(out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for count in range(1000):
    out = Path(sys.argv[1]) / str(count)
    out.mkdir()
    code = child(out, count)
    engine = TextEngine()
    found = resume.load(out, engine, RUN)
    print(code, 0 if found is None else found.epoch, engine.text or "state 0", sep=",")
    resume.save(out, TextEngine("next"), RUN, history=history(7))
    left = {p.name for p in (out / "checkpoint").iterdir() if not p.name.endswith(".part")}
    assert "step-7" in left and len(left) <= 2
    if code == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DYING, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.split("\n") if line]
    codes, epochs = [int(row[0]) for row in rows], [int(row[1]) for row in rows]
    assert codes == [9] * (len(rows) - 1) + [0]
    assert len(rows) > 30  # so many places to die
    assert [row[2] for row in rows] == [f"state {epoch}" for epoch in epochs]
    first = epochs.index(1)
    later = [epoch or 4 for epoch in epochs[first:]]  # 0 again once the run was discarded
    assert set(epochs[:first]) == {0}
    assert later == sorted(later)
    assert set(later) == {1, 2, 3, 4}
