"""What the two TFLite runtimes answer: tflite-runtime 2.14.0 and ai-edge-litert, each in its own environment.

They run in processes of their own, because a bad file can kill the process that opens it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite_worker

RUNTIMES = ("tflite-runtime", "ai-edge-litert")
# The same runtimes with TFLite's own kernels instead of XNNPACK, as on devices and for dtypes that it does not take.
PLAIN_KERNELS = tuple(f"{runtime} without XNNPACK" for runtime in RUNTIMES)

_ROOT = Path(__file__).parent.parent
_FOLDERS = {"tflite-runtime": ".envs/tflite-runtime", "ai-edge-litert": ".envs/litert"}


class RuntimeRefusedError(Exception):
    """The runtime does not take the file or the inputs; its own words."""


class RuntimeCrashedError(Exception):
    """The runtime's process died."""


def answers(runtime: str, file: Path | bytes, *inputs: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """The outputs of a .tflite file for ``inputs``; the file's inputs are resized to their shapes first.

    ``runtime`` is one of `RUNTIMES` or `PLAIN_KERNELS`. Skips the test where its environment is missing.

    Raises RuntimeRefusedError or RuntimeCrashedError; after a crash the next call has a new process.
    """
    name, _, plain = runtime.partition(" without ")
    head = {"path": "" if isinstance(file, bytes) else str(file), "threads": threads, "xnnpack": not plain}
    content = [np.frombuffer(file, np.uint8)] if isinstance(file, bytes) else []
    reply, outputs = _worker(name).ask(head, [*content, *inputs])
    if reply["refused"] is not None:
        raise RuntimeRefusedError(f"{runtime}: {reply['refused']}")
    return outputs


@dataclasses.dataclass
class _Worker:
    """A running `tflite_worker` and the file that gets its complaints."""

    name: str
    process: subprocess.Popen[bytes]
    complaints: Any

    def ask(self, head: dict[str, Any], arrays: list[np.ndarray]) -> tflite_worker.Message:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            tflite_worker.send(self.process.stdin, head, arrays)
            return tflite_worker.receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            del _workers[self.name]
            status = self.stop()
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace")[-2000:]
            self.complaints.close()
            raise RuntimeCrashedError(f"{self.name} died with status {status}: {said}") from None

    def stop(self) -> int:
        """End the process by closing its input; returns its status."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]
        return self.process.wait()


_workers: dict[str, _Worker] = {}


def _worker(name: str) -> _Worker:
    if name not in _workers:
        _workers[name] = _started(name)
    return _workers[name]


def _started(name: str) -> _Worker:
    python = _ROOT / _FOLDERS[name] / "bin/python"
    if not python.exists():
        pytest.skip(f"no environment with {name}: run `make tflite-env`")
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the tests end
    process = subprocess.Popen(
        [python, "-W", "ignore", tflite_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
    )
    return _Worker(name, process, complaints)


@atexit.register
def _stop_all() -> None:
    for worker in _workers.values():
        worker.stop()
        worker.complaints.close()
