"""What a worker process is told and answers: JSON lines on stdin and stdout, about several trainings by name.

``{"do": "hello"}`` -> what it runs on, and its peak memory right after its imports.
``{"do": "open", "name", "job"}`` -> seconds of loading, and what else is known then (seconds of compiling).
``{"do": "step", "name", "count": n}`` -> seconds of each of n steps, the loss of each, and its peak memory so far.
``{"do": "epochs", "name", "run"}`` -> seconds, losses and accuracies of whole epochs; see `Run`.
``{"do": "saved", "name"}`` -> bytes that a forward pass keeps for the backward pass.
``{"do": "close", "name"}`` -> nothing; the training is forgotten.
Anything that fails is answered with ``{"error": text}``. A worker ends when its stdin does.
Workers run in environments without the project's packages, so this module needs numpy alone.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.bench.environment import environment

LR = 1e-5  # small: after hundreds of steps the numbers are still those of training, not of a loss of zero
CLIP = 1.0

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Step = Callable[[], float]  # one training step; returns the loss before it


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


@dataclasses.dataclass(frozen=True)
class Run:
    """Whole epochs: ``data`` is an .npz file of uint8 images and labels, as a device has them.

    ``lr`` is the peak of the schedule, which is made for ``epochs``. After each epoch the images of ``test`` are
    classified, outside of what is timed; the run ends early once the share of right ones is ``target``.
    """

    data: str
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    seed: int = 0
    test: str | None = None
    target: float | None = None


@dataclasses.dataclass
class Epochs:
    """What came of a run: seconds and mean loss of each epoch, the very first loss, and accuracies where asked for."""

    first_loss: float = float("nan")
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)

    def add(self, run: Run, seconds: float, losses: list[float], judge: Callable[[], float]) -> bool:
        """Note an epoch; says whether the run is over."""
        if not self.seconds:
            self.first_loss = losses[0]
        self.seconds.append(seconds)
        self.losses.append(float(np.mean(losses)))
        if run.test is not None:
            self.accuracies.append(judge())
        return run.target is not None and self.accuracies[-1] >= run.target


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A training that is open: a step of it, and whatever else a worker can do; ``facts`` are told at once."""

    step: Step
    epochs: Callable[[Run], Epochs] | None = None
    saved: Callable[[], int] | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def peak_bytes() -> int:
    """Largest resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def serve(prepare: Callable[[Job], Prepared]) -> int:
    """Answer requests until stdin ends. Imports should be done by now."""
    bench, out = Bench(prepare, peak_bytes()), own_stdout()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(bench, request.pop("do"))(**request)
        except Exception as err:  # noqa: BLE001 - the parent reports what a competitor refuses
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


class Bench:
    """The open trainings of one worker; its methods are the requests."""

    def __init__(self, prepare: Callable[[Job], Prepared], imported: int) -> None:
        self._prepare, self._imported = prepare, imported
        self._open: dict[str, Prepared] = {}

    def hello(self) -> dict[str, Any]:
        """Where this runs."""
        return {"environment": environment(), "imported_bytes": self._imported}

    def open(self, name: str, job: dict[str, Any]) -> dict[str, float]:
        """Load a training."""
        started = time.perf_counter()
        self._open[name] = made = self._prepare(Job(**job))
        return {"seconds": time.perf_counter() - started, **made.facts}

    def step(self, name: str, count: int) -> dict[str, Any]:
        """Make so many steps."""
        seconds, losses, step = [], [], self._open[name].step
        for _ in range(count):
            started = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}

    def epochs(self, name: str, run: dict[str, Any]) -> dict[str, Any]:
        """Make whole epochs, from the start of the artifact."""
        made = self._open[name].epochs
        if made is None:
            raise ValueError("this competitor makes single steps only")
        return dataclasses.asdict(made(Run(**run)))

    def saved(self, name: str) -> dict[str, int]:
        """Count what is kept for the backward pass."""
        made = self._open[name].saved
        if made is None:
            raise ValueError("this competitor cannot tell what it keeps for the backward pass")
        return {"bytes": made()}

    def close(self, name: str) -> dict[str, Any]:
        """Forget a training."""
        del self._open[name]
        gc.collect()
        return {}


def own_stdout() -> IO[str]:
    """What is stdout now; whatever libraries print goes to stderr from here on."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own
