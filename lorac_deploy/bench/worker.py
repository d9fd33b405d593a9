"""Worker: several model files of one format, each opened more than once, run in an order that the parent gives.

A script of its own, started by its path with the Python of any environment that has numpy and a runtime: onnxruntime
(any build) for .onnx, ai-edge-litert or tflite-runtime for .tflite. The job is JSON on its command line:
``{"format", "threads", "cores": [numbers] or null}``; then JSON lines on stdin are answered on stdout:

``{"do": "hello"}`` -> the runtime, its version, and the cores that it is pinned to.
``{"do": "open", "name", "path", "feeds"}`` -> seconds of loading the file and of its first run; ``feeds`` is an .npz
file with an array for every input, by name. A name that is open is closed first.
``{"do": "answer", "name"}`` -> the first output of one run, as a list.
``{"do": "warm", "names", "seconds"}`` -> the seconds of runs of each until they no longer get faster.
``{"do": "turns", "names", "counts"}`` -> for each name in order, seconds of so many runs, after one not counted.
Anything that fails is answered with ``{"error": text}``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

TFLITE = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
DISTRIBUTIONS = ("onnxruntime-training-cpu", "onnxruntime", "ai-edge-litert", "tflite-runtime")
WINDOW, STEADY = 5, 0.02  # runs that are compared with the same number before them; the share they may gain
FEWEST = 3  # runs that warm, however long each takes
Arrays = Mapping[str, Any]


class OnnxModel:
    """An ONNX file in a session of its own, its inputs bound once."""

    def __init__(self, path: str, feeds: Arrays, threads: int) -> None:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other files run in between
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        _check_inputs({i.name: tuple(i.shape) for i in session.get_inputs()}, feeds, path)
        self._session, self._io = session, session.io_binding()
        self._feeds = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        for name, value in self._feeds.items():
            self._io.bind_ortvalue_input(name, value)
        self._io.bind_output(session.get_outputs()[0].name)
        self.run: Callable[[], Any] = lambda: session.run_with_iobinding(self._io)

    def answer(self) -> Any:
        """The first output."""
        self.run()
        return self._io.copy_outputs_to_cpu()[0]


class TfliteModel:
    """A TFLite file in an interpreter of its own; an input of NHWC takes a feed of NCHW too."""

    def __init__(self, path: str, feeds: Arrays, threads: int) -> None:
        self._interpreter = make = interpreter_class()(path, num_threads=threads)
        details = make.get_input_details()
        if len(details) != len(feeds):
            raise ValueError(f"{path} has {len(details)} inputs, {len(feeds)} are given: {', '.join(feeds)}")
        for given, value in zip(details, feeds.values(), strict=True):
            fed = _fitting(value, tuple(int(size) for size in given["shape"]), path)
            make.resize_tensor_input(given["index"], fed.shape)
            make.allocate_tensors()
            make.set_tensor(given["index"], np.ascontiguousarray(fed, given["dtype"]))
        self.run: Callable[[], Any] = make.invoke

    def answer(self) -> Any:
        """The first output, in real numbers."""
        self.run()
        detail = self._interpreter.get_output_details()[0]
        value = self._interpreter.get_tensor(detail["index"])
        scale, zero = detail["quantization"]
        return value if not scale else (value.astype(np.float32) - zero) * scale


MODELS: dict[str, Callable[[str, Arrays, int], Any]] = {"onnx": OnnxModel, "tflite": TfliteModel}


def interpreter_class() -> Any:
    """The Interpreter of the TFLite runtime that is installed. Raises ImportError if none is."""
    for name in TFLITE:
        try:
            return importlib.import_module(name).Interpreter
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(TFLITE)} is installed")


def _check_inputs(wanted: Mapping[str, tuple[Any, ...]], feeds: Arrays, path: str) -> None:
    given = {name: value.shape for name, value in feeds.items()}
    fits = wanted.keys() == given.keys() and all(_fits(wanted[name], shape) for name, shape in given.items())
    if not fits:
        raise ValueError(f"{path} takes {dict(wanted)}, given are {given}")


def _fits(wanted: tuple[Any, ...], given: tuple[int, ...]) -> bool:
    return len(wanted) == len(given) and all(not isinstance(w, int) or w == g for w, g in zip(wanted, given))  # noqa: B905


def _fitting(value: Any, shape: tuple[int, ...], path: str) -> Any:
    """``value`` with its axes as the file has them; the batch may differ."""
    if tuple(value.shape[1:]) == shape[1:]:
        return value
    turned = value.transpose(0, *range(2, value.ndim), 1)
    if tuple(turned.shape[1:]) != shape[1:]:
        raise ValueError(f"{path} takes {shape}, given is {value.shape}")
    return turned


class Bench:
    """The open files of one job."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._make, self._threads = MODELS[job["format"]], int(job["threads"])
        self._open: dict[str, Any] = {}

    def hello(self) -> dict[str, Any]:
        """What runs here."""
        found = {name: version for name in DISTRIBUTIONS if (version := _version(name))}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return {"runtimes": found, "numpy": np.__version__, "cores": cores}

    def open(self, name: str, path: str, feeds: str) -> dict[str, float]:
        """Load a file, run it once."""
        self._open.pop(name, None)
        with np.load(feeds) as arrays:
            loaded = dict(arrays)
        started = time.perf_counter()
        model = self._make(path, loaded, self._threads)
        ready = time.perf_counter()
        model.run()
        self._open[name] = model
        return {"load": ready - started, "first": time.perf_counter() - ready}

    def answer(self, name: str) -> dict[str, Any]:
        """What a file computes."""
        return {"output": np.asarray(self._open[name].answer(), np.float64).tolist()}

    def warm(self, names: list[str], seconds: float) -> dict[str, list[float]]:
        """Run each until its last runs are no faster than those before, or for so many seconds."""
        return {name: _warmed(self._open[name].run, seconds) for name in names}

    def turns(self, names: list[str], counts: list[int]) -> dict[str, list[list[float]]]:
        """Runs of each, in this order; the first of each turn finds the caches as the last one left them."""
        return {"seconds": [_timed(self._open[n].run, count + 1)[1:] for n, count in zip(names, counts)]}  # noqa: B905


def _warmed(run: Callable[[], Any], seconds: float) -> list[float]:
    found = _timed(run, FEWEST)
    while sum(found) < seconds and not _steady(found):
        found += _timed(run, 1)
    return found


def _steady(found: list[float]) -> bool:
    if len(found) < 2 * WINDOW:
        return False
    before, now = (statistics.median(part) for part in (found[-2 * WINDOW : -WINDOW], found[-WINDOW:]))
    return now > (1 - STEADY) * before


def _timed(run: Callable[[], Any], count: int) -> list[float]:
    found, clock = [], time.perf_counter
    for _ in range(count):
        started = clock()
        run()
        found.append(clock() - started)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def reply(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    what = request.pop("do")
    if what not in ("hello", "open", "answer", "warm", "turns"):
        raise ValueError(f"nothing is known of {what!r}")
    found: dict[str, Any] = getattr(bench, what)(**request)
    return found


def pin(cores: list[int] | None) -> None:
    """Stay on these cores, where the system lets a process choose."""
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # it is asked for its cores, so that nobody is told otherwise
            os.sched_setaffinity(0, cores)


def own_stdout() -> IO[str]:
    """What is stdout now; whatever libraries print goes to stderr from here on."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def main(job: dict[str, Any]) -> int:
    """Answer requests until stdin ends."""
    out = own_stdout()
    pin(job.get("cores"))
    bench = Bench(job)
    for line in sys.stdin:
        try:
            answer = reply(bench, json.loads(line))
        except Exception as err:  # noqa: BLE001 - the parent says what a runtime refuses
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
