"""Worker: forward passes of base.onnx, ``passes`` in a step, with the runtime's own session settings.

Two passes are the floor that a training step is held against: a backward pass takes at least as long as a forward
one. Nothing trains here; the loss is that of the first pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.step_protocol import Images, Job, Labels, Prepared, serve
from lorac_runtime.engines import wheel
from lorac_runtime.engines.native import PROVIDERS, session_options
from lorac_runtime.manifest import BASE


def prepare(job: Job) -> Prepared:
    """So many passes, the batch and the logits bound once."""
    ort = wheel.load_inference()
    path = str(Path(job.artifact) / BASE)
    session = ort.InferenceSession(path, session_options(ort, job.threads), providers=list(PROVIDERS))
    images, labels = job.load_batch()
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    io = session.io_binding()
    io.bind_ortvalue_input(session.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(images))
    io.bind_ortvalue_output(session.get_outputs()[0].name, ort.OrtValue.ortvalue_from_numpy(logits))
    loss = cross_entropy(logits, labels)

    def step() -> float:
        for _ in range(job.options["passes"]):
            session.run_with_iobinding(io)
        return loss

    return Prepared(step)


def cross_entropy(logits: Images, labels: Labels) -> float:
    """Mean over the batch.

    >>> round(cross_entropy(np.zeros((3, 10), np.float32), np.array([0, 1, 2])), 4)
    2.3026
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen))


def main() -> int:
    """Import the native library, then serve."""
    wheel.load_inference()
    return serve(prepare)


if __name__ == "__main__":
    sys.exit(main())
