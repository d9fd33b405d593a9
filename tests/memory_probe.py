"""Train a few steps of a step graph in this process, and print what memory that took, as JSON.

A prefix_step.onnx beside the graph computes its features before each step, image by image, and stays open.
``python memory_probe.py GRAPH BATCH STEPS``: bytes of the process after its imports, with the session open, the most
while it was opened, the most while it stepped, and the larger of these two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lorac_runtime.engines import wheel
from lorac_runtime.engines.carried import Carried, StepSession
from lorac_runtime.engines.native import PROVIDERS, frugal, return_freed_memory, session_options

KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}


def resident(field: str) -> int:
    """VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def features_of(front: object, batch: int) -> dict[str, np.ndarray]:
    """What the frozen front gives for a batch of random images."""
    (source,), outputs = front.get_inputs(), front.get_outputs()  # type: ignore[attr-defined]
    images = np.random.default_rng(1).random((batch, *source.shape[1:]), np.float32).astype(KINDS[source.type])
    found = {value.name: np.empty((batch, *value.shape[1:]), np.float32) for value in outputs}
    for i in range(batch):
        for value, row in zip(found.values(), front.run(None, {source.name: images[i : i + 1]}), strict=True):  # type: ignore[attr-defined]
            value[i] = row[0]
    return found


def main(graph: str, batch: int, steps: int) -> dict[str, float]:
    ort = wheel.load_inference()
    imported = resident("VmHWM")
    return_freed_memory()
    prefix = Path(graph).with_name("prefix_step.onnx")
    names = [*([str(prefix)] if prefix.exists() else []), graph]
    *fronts, session = [
        ort.InferenceSession(n, frugal(session_options(ort, 1)), providers=list(PROVIDERS)) for n in names
    ]
    opened, held = resident("VmHWM"), resident("VmRSS")
    rng = np.random.default_rng(0)
    outputs = {value.name for value in session.get_outputs()}
    carried, feeds = {}, {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else batch for d in value.shape]
        if f"{value.name}.next" in outputs:
            carried[value.name] = np.zeros(shape, KINDS[value.type])  # takes no memory before it is written
        else:
            feeds[value.name] = rng.random(shape, np.float32).astype(KINDS[value.type])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    both = Carried(ort, carried)
    carried.clear()
    step = StepSession(ort, session, [both], [n for n in outputs if not n.endswith(".next")])
    for _ in range(steps):
        for front in fronts:
            feeds |= features_of(front, batch)
        loss = step.run(feeds)["loss"]
        both.swap()
    stepped = resident("VmHWM")
    return {
        "imported": imported,
        "held": held,
        "opened": opened,
        "stepped": stepped,
        "peak": max(opened, stepped),
        "loss": loss,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
