"""Worker: this project's runtime. Options: ``engine``, perhaps ``micro_batch``, and ``cache``.

With ``cache`` a step takes features that are in memory, and epochs keep them as a fine-tuning run with --cache does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_protocol import LR, Epochs, Job, Prepared, Run, serve
from lorac_runtime.cache import FeatureCache
from lorac_runtime.config import Settings
from lorac_runtime.data import LocalData
from lorac_runtime.engines import Engine, open_engine, wheel
from lorac_runtime.manifest import Manifest, load
from lorac_runtime.training import History, Inputs, Progress, Samples, computed, evaluate, train_epoch

CACHE = 1 << 30


def prepare(job: Job) -> Prepared:
    """A step of the engine that the job names, on a batch in memory."""
    manifest = load(Path(job.artifact))
    engine = opened(job, manifest)
    images, labels = job.load_batch()
    batch = engine.inputs(images) if job.options.get("cache") else images
    if job.options.get("cache") and engine.prefix is not None:
        engine.prefix.close()  # as a cache does once it holds all samples
    return Prepared(lambda: engine.train_step(batch, labels, LR), functools.partial(epochs, job, manifest))


def opened(job: Job, manifest: Manifest) -> Engine:
    """The engine at the artifact's start."""
    micro_batch = job.options.get("micro_batch")
    engine = job.options["engine"]
    return open_engine(Path(job.artifact), manifest, engine=engine, threads=job.threads, micro_batch=micro_batch)


def epochs(job: Job, manifest: Manifest, run: Run) -> Epochs:
    """Whole epochs by the training loop of a fine-tuning run."""
    found, history = Epochs(), History()
    engine, training = opened(job, manifest), samples(manifest, run.data, run)
    judge = functools.partial(_accuracy, engine, opened(job, manifest), samples(manifest, run.test or run.data, run))
    settings = Settings(run.epochs, run.batch_size, run.lr, run.warmup, val_fraction=0.0, seed=run.seed)
    with inputs(job, engine, manifest, training) as given:
        for _ in range(run.epochs):
            before = history
            history = train_epoch(engine, training, settings, before, on_progress=_ignore, inputs=given)
            seconds, losses = history.seconds - before.seconds, list(history.losses[len(before.losses) :])
            if found.add(run, seconds, losses, judge):
                break
    return found


def samples(manifest: Manifest, path: str, run: Run) -> Samples:
    """All images of a file."""
    with np.load(path) as arrays:
        data = LocalData(arrays["images"], arrays["labels"])
    return Samples(data, np.arange(len(data)), manifest.input, run.batch_size)


@contextlib.contextmanager
def inputs(job: Job, engine: Engine, manifest: Manifest, training: Samples) -> Any:
    """What steps take: from a cache of its own, which is empty, or computed anew for each batch."""
    if not job.options.get("cache"):
        given: Inputs = computed(engine)
        yield given
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(
            FeatureCache(Path(folder) / "cache", engine, manifest, training, budget=CACHE, fp16=False)
        ) as cache,
    ):
        yield cache.inputs


def _accuracy(engine: Engine, judge: Engine, test: Samples) -> float:
    """By a second engine: the first would close the session that steps, and open it again in the next epoch."""
    judge.load_state(engine.state())
    found = evaluate(judge, dataclasses.replace(test, batch_size=128)).accuracy
    if found is None:
        raise ValueError("the test images have no labels")
    return found


def _ignore(progress: Progress) -> None:
    del progress


def main() -> int:
    """Import the native library, then serve."""
    wheel.load_inference()
    return serve(prepare)


if __name__ == "__main__":
    sys.exit(main())
