"""The device's script as a process of its own: from a checkout, interrupted, without room."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifacts import Tiny, build
from cli_runs import Run, arrays, runner
from isolated import run_isolated
from tiny_network import Recipe

from lorac_runtime import cli
from lorac_runtime.training import Progress


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "local.npz", **arrays())
    return tmp_path / "local.npz"


@pytest.fixture
def run(tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(tiny.folder, data, tmp_path, capsys=capsys)


def process(root: Path, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    """The script of the checkout in a new Python, after running ``before`` in it."""
    script = root / "runtime" / "ort_finetune.py"
    code = f"{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(script.parent)!r})\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = started.communicate(timeout=60)
    return started.returncode, stdout, stderr


def test_the_script_runs_from_a_checkout_that_is_not_installed(
    tiny: Tiny, data: Path, tmp_path: Path, root: Path
) -> None:
    command = [root / "runtime" / "ort_finetune.py", tiny.folder, "--data", data, "--out", tmp_path / "out"]
    done = run_isolated([*command, "--epochs", 1], tmp_path / "site", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "held-out samples" in done.stdout
    assert (tmp_path / "out" / "fused.onnx").exists()


# A shell that starts jobs in the background has them ignore Ctrl-C, and the tests may be such a job.
LISTEN_TO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def test_ctrl_c_says_how_to_go_on(tiny: Tiny, data: Path, tmp_path: Path, root: Path) -> None:
    arguments = (tiny.folder, "--data", data, "--out", tmp_path / "out", "--epochs", 2000, "--threads", 1)
    with process(root, *arguments, before=LISTEN_TO_CTRL_C) as started:
        assert started.stderr is not None
        while "epoch    2/2000" not in started.stderr.readline():
            assert started.poll() is None
        started.send_signal(signal.SIGINT)
        status, _, stderr = finished(started)
    assert status == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command goes on after the last checkpoint"
    assert "Traceback" not in stderr


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_was_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: cli.Display, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Display, "progress", interrupted)
    status, _, stderr = run()
    assert (status, stderr.splitlines()[-1]) == (130, "interrupted; no checkpoint was written, nothing was kept")


LIMIT_FILE_SIZE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"


LIMIT_MEMORY = """
import resource
from lorac_runtime.engines import wheel
wheel.load()
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((now << 10) + (60 << 20),) * 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_cannot_grow_ends_in_a_message(tiny: Tiny, data: Path, tmp_path: Path, root: Path) -> None:
    """Writing fails in the middle of the engine's own checkpoint, as on a full disk."""
    arguments = (tiny.folder, "--data", data, "--out", tmp_path / "out", "--epochs", 1)
    status, _, stderr = finished(process(root, *arguments, before=LIMIT_FILE_SIZE))
    assert status == 1
    assert "a checkpoint could not be written" in stderr
    assert "Traceback" not in stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    status, _, stderr = finished(process(root, *arguments))
    assert status == 0, stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_ends_in_advice(tiny: Tiny, tmp_path: Path, root: Path) -> None:
    np.savez(tmp_path / "big.npz", **arrays(20_000))
    arguments = ("--data", tmp_path / "big.npz", "--out", tmp_path / "out", "--batch-size", 20_000, "--threads", 1)
    status, _, stderr = finished(process(root, tiny.folder, *arguments, before=LIMIT_MEMORY))
    assert status == 1
    assert re.search(r"error: not enough memory \(.*\)\. Try a smaller --batch-size", stderr)
    assert "Traceback" not in stderr
