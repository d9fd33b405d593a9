"""Worker: processor time of small graphs that compute the same, on one thread. Needs numpy and onnxruntime alone.

stdin: a JSON list of rivalries, each {"files": [path, ...], "inputs": {name: shape}, "seconds": time to spend}.
stdout: a JSON line for each: the least processor time of one run of each file, in seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

SAMPLE = 2e-3  # seconds; shorter runs are repeated within a sample
LEAST_ROUNDS = 5


def runner(path: str, feed: Mapping[str, Any]) -> Callable[[], Any]:
    """A run of one graph on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feed))


def processor_time(run: Callable[[], Any], count: int) -> float:
    """Mean processor time of ``count`` runs."""
    started = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - started) / count


def rivals(files: Sequence[str], inputs: Mapping[str, Sequence[int]], seconds: float) -> list[float]:
    """The least time of each file; their runs take turns, so that other load on the machine hits all alike."""
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in inputs.items()}
    runs = [runner(path, feed) for path in files]
    first = [min(processor_time(run, 1) for _ in range(2)) for run in runs]
    counts = [max(1, round(SAMPLE / t)) for t in first]
    rounds = max(LEAST_ROUNDS, int(seconds / sum(t * n for t, n in zip(first, counts, strict=True))))
    samples = [[processor_time(run, n) for run, n in zip(runs, counts, strict=True)] for _ in range(rounds)]
    return [min(column) for column in zip(*samples, strict=True)]


def main() -> int:
    """Answer every request of stdin."""
    for request in json.load(sys.stdin):
        print(json.dumps(rivals(request["files"], request["inputs"], request["seconds"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
