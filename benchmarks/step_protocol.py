"""What a worker process is told and answers: a job on its command line, then JSON lines on stdin and stdout.

``{"do": "hello"}`` -> what it runs on, and its peak memory right after its imports.
``{"do": "step", "count": n}`` -> seconds of each of n steps, the loss of each, and its peak memory so far.
Anything that fails is answered with ``{"error": text}``. A worker ends when its stdin does.
Workers run in environments without the project's packages, so this module needs numpy alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from lorac_deploy.bench.environment import environment

LR = 1e-5  # small: after hundreds of steps the numbers are still those of training, not of a loss of zero
CLIP = 1.0
NETWORK = "network.pt"  # the PyTorch network, beside the artifacts made from it

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Step = Callable[[], float]  # one training step; returns the loss before it
Prepared = TypeVar("Prepared")  # what a worker makes of its job, before the first request


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker steps: an artifact's folder, a file with one batch, threads, and options of its own."""

    artifact: str
    batch: str
    threads: int
    options: dict[str, Any]

    def load_batch(self) -> tuple[Images, Labels]:
        """(images (N, C, H, W), labels (N,))."""
        with np.load(self.batch) as arrays:
            return arrays["images"], arrays["labels"]


def peak_bytes() -> int:
    """Largest resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def serve(prepare: Callable[[Job], Step]) -> int:
    """Answer requests about the job on the command line until stdin ends. Imports should be done by now."""
    imported = peak_bytes()
    return serve_job(prepare, lambda request, step: _answer(request, step, imported))


def serve_job(prepare: Callable[[Job], Prepared], reply: Callable[[dict[str, Any], Prepared], dict[str, Any]]) -> int:
    """Answer requests with ``reply``, about what ``prepare`` makes of the job on the command line, until stdin ends."""
    out, prepared = own_stdout(), None
    for line in sys.stdin:
        try:
            prepared = prepared or prepare(Job(**json.loads(sys.argv[1])))
            answer = reply(json.loads(line), prepared)
        except Exception as err:  # noqa: BLE001 - the parent reports what a competitor refuses
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


def own_stdout() -> IO[str]:
    """What is stdout now; whatever libraries print goes to stderr from here on."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _answer(request: dict[str, Any], step: Step, imported: int) -> dict[str, Any]:
    if request["do"] == "hello":
        return {"environment": environment(), "imported_bytes": imported}
    seconds, losses = [], []
    for _ in range(request["count"]):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}
