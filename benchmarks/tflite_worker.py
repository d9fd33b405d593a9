"""Worker: several .tflite files, each open in an interpreter of its own, run in turn on one input.

``{"do": "hello"}`` -> what it runs on. ``{"do": "run", "file": name, "count": n}`` -> seconds of each of n runs.
``{"do": "answer", "file": name}`` -> the first output, as a list. The job's options hold ``files`` (name to path,
opened in that order). Runs with tflite-runtime or ai-edge-litert, whichever the environment has.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import numpy as np

from benchmarks.step_protocol import Job, serve_job
from lorac_deploy.bench.environment import environment

MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


def interpreter_class() -> Any:
    """The Interpreter of the runtime that is installed. Raises ImportError if none is."""
    for name in MODULES:
        try:
            return importlib.import_module(name).Interpreter
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(MODULES)} is installed")


class Files:
    """The interpreters of one job, fed with its batch."""

    def __init__(self, job: Job) -> None:
        make, (images, _) = interpreter_class(), job.load_batch()
        self._opened = {name: make(path, num_threads=job.threads) for name, path in job.options["files"].items()}
        for interpreter in self._opened.values():
            (given,) = interpreter.get_input_details()
            fed = images if tuple(given["shape"]) == images.shape else images.transpose(0, 3, 1, 2)
            if tuple(given["shape"][1:]) != fed.shape[1:]:
                raise ValueError(f"an input takes {given['shape']}, the batch is {images.shape}")
            interpreter.resize_tensor_input(given["index"], fed.shape)
            interpreter.allocate_tensors()
            interpreter.set_tensor(given["index"], np.ascontiguousarray(fed, given["dtype"]))

    def run(self, name: str, count: int) -> list[float]:
        """Seconds of each run."""
        invoke, seconds = self._opened[name].invoke, []
        for _ in range(count):
            started = time.perf_counter()
            invoke()
            seconds.append(time.perf_counter() - started)
        return seconds

    def answer(self, name: str) -> list[Any]:
        """The first output of one run."""
        interpreter = self._opened[name]
        interpreter.invoke()
        numbers: list[Any] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).tolist()
        return numbers


def reply(request: dict[str, Any], files: Files) -> dict[str, Any]:
    """The answer to one request."""
    if request["do"] == "hello":
        return {"environment": environment()}
    if request["do"] == "run":
        return {"seconds": files.run(request["file"], request["count"])}
    return {"output": files.answer(request["file"])}


if __name__ == "__main__":
    sys.exit(serve_job(Files, reply))
