"""Worker: a step of this project's runtime. Options: ``engine``, and perhaps ``micro_batch``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.step_protocol import LR, Job, Step, serve
from lorac_runtime.engines import open_engine, wheel
from lorac_runtime.manifest import load


def prepare(job: Job) -> Step:
    """A step of the engine that the job names."""
    folder = Path(job.artifact)
    engine = open_engine(
        folder,
        load(folder),
        engine=job.options["engine"],
        threads=job.threads,
        micro_batch=job.options.get("micro_batch"),
    )
    images, labels = job.load_batch()
    return lambda: engine.train_step(images, labels, LR)


def main() -> int:
    """Import the native library, then serve."""
    wheel.load_inference()
    return serve(prepare)


if __name__ == "__main__":
    sys.exit(main())
