"""What the cells of a study share, made once and kept: artifacts, drifted data, and what the base makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from lorac_deploy.corruptions import corrupt
from lorac_deploy.study.cells import digest
from lorac_deploy.study.config import StudyConfig, StudyDrift, StudyError, StudyMethod
from lorac_deploy.study_data import flip
from lorac_exporters.verify import run_onnx
from lorac_runtime.data import LocalData, load_data, preprocess
from lorac_runtime.errors import ConversionError
from lorac_runtime.files import atomic_write
from lorac_runtime.manifest import BASE, FILE_NAME, load, sha256

TEST_SEED = 1_000_003  # noise on test samples is the same in every cell, and not that of any training set
CLEAN = StudyDrift("none")
BATCH = 250


@dataclasses.dataclass(frozen=True)
class Bench:
    """A study and the folder that it works in; workers get a copy. ``sources`` is a digest of all files read."""

    config: StudyConfig
    out: Path
    sources: str

    def artifact(self, method: StudyMethod, seed: int) -> Path:
        """Where the artifact of a method lies; methods that differ only on the device share one."""
        settings = dataclasses.asdict(method) | {"name": "", "cache": None}
        return self.out / "artifacts" / digest([settings, seed, self.sources])

    def local(self, drift: StudyDrift, seed: int) -> Path:
        """Where the drifted samples lie that a seed draws from the pool, with their true labels."""
        return (
            self.out / "data" / f"{digest([dataclasses.asdict(drift), seed, max(self.config.sizes), self.sources])}.npz"
        )

    def test(self, drift: StudyDrift) -> Path:
        """Where the drifted test samples lie."""
        return self._data(drift, "test")

    def _data(self, drift: StudyDrift, *more: object) -> Path:
        return self.out / "data" / f"{digest([dataclasses.asdict(drift), *more, self.sources])}.npz"

    def base_accuracy(self, drift: StudyDrift) -> Path:
        """Where the base's accuracy on the drifted test samples is kept."""
        return self.test(drift).with_suffix(".json")


def open_bench(config: StudyConfig, out: Path) -> Bench:
    """A bench in the folder ``out``, which is made.

    Raises OSError if it cannot be, StudyError if the pool has too few samples.
    """
    for name in ("artifacts", "data", "cells"):
        (out / name).mkdir(parents=True, exist_ok=True)
    files = [config.data, config.test, *(p for d in config.drifts for p in (d.data, d.test) if p is not None)]
    files += sorted(path for path in config.checkpoint.iterdir() if path.is_file())
    return Bench(config, out, digest([(path.name, sha256(path)) for path in files]))


def make_artifact(bench: Bench, method: StudyMethod, seed: int) -> None:
    """Export the method's artifact where it is not there yet.

    Raises StudyError for a method that does not fit the network.
    """
    from lorac_deploy.export import export_training_artifact
    from lorac_exporters.artifact import ArtifactConfig

    out = bench.artifact(method, seed)
    if (out / FILE_NAME).is_file():
        return
    try:
        config = ArtifactConfig(
            lora=dataclasses.replace(method.lora, seed=seed),
            method=method.method,
            bn_policy=method.bn,
            engine="onnxruntime",
            form=method.form,
            tflite="none",
            training=method.training,
        )
        export_training_artifact(bench.config.checkpoint, out, config=config, on_progress=lambda _: None)
    except (ConversionError, ValueError) as err:
        raise StudyError(f"method {method.name!r} cannot train this network: {err}") from err


def make_local(bench: Bench, drift: StudyDrift, seed: int, artifact: Path) -> None:
    """Draw, drift and keep as many samples as the largest size asks for; smaller sizes take the first of them.

    Raises StudyError if the pool has too few.
    """
    path = bench.local(drift, seed)
    if not path.is_file():
        pool = read_samples(drift.data or bench.config.data, artifact)
        wanted = max(bench.config.sizes)
        if wanted > len(pool):
            raise StudyError(
                f"sizes: {wanted} samples are wanted, but {drift.data or bench.config.data} has {len(pool)}"
            )
        order = np.random.default_rng([seed, 11]).permutation(len(pool))[:wanted]
        _write(path, _drifted(drift, LocalData(pool.images[order], _labels(pool)[order]), artifact, seed), artifact)


def make_test(bench: Bench, drift: StudyDrift, artifact: Path) -> None:
    """Drift and keep the test samples, and take the base's accuracy on them."""
    path = bench.test(drift)
    if not path.is_file():
        data = read_samples(drift.test or bench.config.test, artifact)
        _write(path, _drifted(drift, data, artifact, TEST_SEED), artifact)
    if not bench.base_accuracy(drift).is_file():
        found = accuracy(artifact / BASE, path, artifact)
        atomic_write(bench.base_accuracy(drift), json.dumps(found).encode())


def accuracy(model: Path, data: Path, artifact: Path) -> float:
    """The share of samples that an .onnx file of this artifact classifies rightly."""
    spec, found = load(artifact).input, read_samples(data, artifact)
    right = 0
    for start in range(0, len(found), BATCH):
        part = slice(start, start + BATCH)
        logits = run_onnx(model, preprocess(found.images[part], spec))
        right += int(np.count_nonzero(logits.argmax(axis=1) == _labels(found)[part]))
    return right / len(found)


def write_local(path: Path, data: LocalData, labels: Any | None, artifact: Path) -> None:
    """Write a .npz file for the runtime, without labels where ``labels`` is None."""
    arrays = {load(artifact).input.key: data.images} | ({} if labels is None else {"labels": labels})
    np.savez(path, **arrays)


def read_local(bench: Bench, drift: StudyDrift, seed: int, size: int, artifact: Path) -> LocalData:
    """The first ``size`` of the samples that `make_local` kept."""
    data = read_samples(bench.local(drift, seed), artifact)
    return LocalData(data.images[:size], _labels(data)[:size])


def read_samples(path: Path, artifact: Path) -> LocalData:
    """Samples of a .npz file that fit an artifact; they need not be of several classes."""
    manifest = load(artifact)
    return load_data(path, manifest.input, manifest.output.classes, manifest.class_names, require_classes=1)


def _labels(data: LocalData) -> Any:
    if data.labels is None:
        raise StudyError("a study needs labels: of the pool to train with, and of test data to take accuracies")
    return data.labels


def _write(path: Path, data: LocalData, artifact: Path) -> None:
    """Beside, then renamed: a killed study leaves no half file under the final name."""
    part = path.with_name(f"part-{path.name}")
    write_local(part, data, data.labels, artifact)
    part.replace(path)


def _drifted(drift: StudyDrift, data: LocalData, artifact: Path, seed: int) -> LocalData:
    manifest = load(artifact)
    if drift.data is not None or drift.name == "none":
        return data
    if drift.name == "flip":
        return LocalData(data.images, flip(_labels(data), manifest.output.classes))
    if not manifest.input.is_image:
        raise StudyError(f"drift {drift.name} is one of images, and this network takes signals: give files of its own")
    name, severity = drift.name.split(":")
    return LocalData(corrupt(data.images, name, int(severity), seed=seed), data.labels)
