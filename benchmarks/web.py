"""The page that trains beside the runtime: how far apart their adapters are, and how long their steps take.

Agreement: the same images, seed and settings on the page and in the runtime. Beside it stands how far the runtime is
from itself: with the graph optimizations of its engine turned off, which changes nothing but the order of sums, and
from a start of which every number was moved by one unit in the last place. Speed: page and runtime by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.web_browser import chromium, distance, visit
from lorac_deploy.bench.environment import environment
from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import load_dataset
from lorac_deploy.export import export_training_artifact
from lorac_deploy.web.site import write_site
from lorac_exporters.artifact import ArtifactConfig
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.engines import graph_files, native
from lorac_runtime.fleet.payload import Tensors
from lorac_runtime.manifest import ADAPTER, TrainingDefaults, load
from lorac_runtime.session import FinetuneConfig, finetune

OPTIMIZERS = {
    "AdamW": TrainingDefaults(),
    "SGD, momentum 0.9": TrainingDefaults(optimizer="sgd", momentum=0.9, lr=0.05),
}
STEPS, BATCH, CLASSES = (1, 10), 24, 10
HELD_OUT = 0.2
Made = tuple[Path, Path]  # an artifact and its page
TIMED, TIMED_BATCH = 10, 32  # steps


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Sessions of the runtime compute operator by operator, without blocked layouts."""

    def options(ort: Any, threads: int | None) -> Any:
        made = native.session_options(ort, threads)
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return made

    with mock.patch.object(graph_files, "session_options", options):
        yield


def write_images(path: Path, steps: int, batch: int) -> None:
    """Digits in the dark, as many of each as make ``steps`` batches after a fifth of them is held out."""
    pool = load_dataset("digits", split="train")
    each = round(steps * batch / (1 - HELD_OUT) / CLASSES)
    chosen = np.sort(np.concatenate([np.flatnonzero(pool.labels == c)[:each] for c in range(CLASSES)]))
    seen = corrupt(pool.images[chosen], "darken", 3, seed=0)
    np.savez(path, images=seen, labels=pool.labels[chosen])


def runtime(
    artifact: Path, images: Path, out: Path, config: FinetuneConfig, adapter: Path | None = None
) -> tuple[Tensors, list[float]]:
    """The adapter after a training by the runtime, and the milliseconds of each step but the first."""
    stamps: list[float] = []
    finetune(artifact, images, out, config, adapter=adapter, on_progress=lambda _: stamps.append(time.perf_counter()))
    return load_adapter(out / ADAPTER).tensors, [1e3 * (b - a) for a, b in itertools.pairwise(stamps)]


def config_of(batch: int, *, seed: int = 0, threads: int = 1) -> FinetuneConfig:
    """An epoch from the artifact's own start."""
    return FinetuneConfig(epochs=1, batch_size=batch, seed=seed, threads=threads, val_fraction=HELD_OUT, restart=True)


def nudged(artifact: Path, out: Path, seed: int) -> Path:
    """The artifact's start with every number but zeros moved to one of its neighbours in float32."""
    start, rng = load_adapter(artifact / ADAPTER), np.random.default_rng(seed)
    tensors = {}
    for name, value in start.tensors.items():
        towards = np.where(rng.integers(0, 2, value.shape) == 1, np.inf, -np.inf).astype(np.float32)
        tensors[name] = np.where(value == 0, value, np.nextafter(value, towards))
    save_adapter(out, tensors, start.metadata)
    return out


def agreement(browser: Any, made: Made, steps: int, seed: int, work: Path) -> dict[str, float]:
    """How far from the runtime's adapter others are after ``steps`` steps: the page's, and the runtime's own."""
    artifact, site = made
    images, config = work / f"{steps}.npz", config_of(BATCH, seed=seed)
    write_images(images, steps, BATCH)
    ours, _ = runtime(artifact, images, work / "runtime", config)
    with plain_kernels():
        plain, _ = runtime(artifact, images, work / "plain", config)
    moved, _ = runtime(artifact, images, work / "moved", config, nudged(artifact, work / "start.safetensors", seed))
    page = visit(browser, site, images, {"epochs": 1, "batch_size": BATCH, "seed": seed}).adapter
    return {"page": distance(page, ours), "plain": distance(plain, ours), "moved": distance(moved, ours)}


def speed(browser: Any, artifact: Path, site: Path, rounds: int, work: Path) -> dict[str, list[float]]:
    """Milliseconds of all steps of page and runtime, on one thread and two, by turns."""
    images = work / "timed.npz"
    write_images(images, TIMED, TIMED_BATCH)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for threads in (1, 2):
            _, steps = runtime(artifact, images, work / "timed", config_of(TIMED_BATCH, threads=threads))
            found.setdefault(f"runtime, {threads}", []).extend(steps)
            settings = {"epochs": 1, "batch_size": TIMED_BATCH}
            seen = visit(browser, site, images, settings, threads=threads > 1)
            found.setdefault(f"page, {threads}", []).extend(seen.milliseconds)
    return found


def make(base: Path, training: TrainingDefaults, engine: Path, work: Path) -> Made:
    """An artifact of a checkpoint, and its page."""
    artifact, site = work / "artifact", work / "site"
    export_training_artifact(base, artifact, config=ArtifactConfig(training=training, tflite="none"))
    write_site(artifact, site, engine=engine)
    return artifact, site


def agreements(browser: Any, base: Path, engine: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each optimizer, number of steps and seed."""
    for name, training in OPTIMIZERS.items():
        with tempfile.TemporaryDirectory() as work:
            made = make(base, training, engine, Path(work))
            for steps, seed in ((steps, seed) for steps in STEPS for seed in range(seeds)):
                found = agreement(browser, made, steps, seed, Path(work))
                yield {"optimizer": name, "steps": steps, "seed": seed, **found}


def speeds(browser: Any, bases: Sequence[Path], engine: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each network, who trains it, and on how many threads."""
    for base in bases:
        with tempfile.TemporaryDirectory() as work:
            artifact, site = make(base, TrainingDefaults(), engine, Path(work))
            model = load(artifact).model
            for who, steps in speed(browser, artifact, site, rounds, Path(work)).items():
                row = {"model": model, "who": who, "steps": len(steps)}
                yield {**row, "minimum": min(steps), "median": statistics.median(steps)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    p = argparse.ArgumentParser(prog="python -m benchmarks web", description=__doc__)
    p.add_argument(
        "--base", type=Path, nargs="+", required=True, help="checkpoints for 10 digits; the first must agree"
    )
    p.add_argument("--engine", type=Path, default=Path(".envs/web"), help="files of onnxruntime-web (%(default)s)")
    p.add_argument("--rounds", type=int, default=4, help="turns of page and runtime (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=10, help="of the adapters that are compared (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="the results, JSON")
    args = p.parse_args(argv)
    found: dict[str, Any] = {"environment": environment(), "agreement": [], "speed": []}
    with chromium() as browser:
        for kind, rows in (
            ("speed", speeds(browser, args.base, args.engine, args.rounds)),
            ("agreement", agreements(browser, args.base[0], args.engine, args.seeds)),
        ):
            for row in rows:
                print(row, file=sys.stderr, flush=True)
                found[kind].append(row)
                args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
