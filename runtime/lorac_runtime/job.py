"""What a fine-tuning run is, settled before any work: artifact, data, settings, and whether it is done already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lorac_runtime import resume
from lorac_runtime.adapter import AdapterFile, load_adapter, to_manifest_coordinates
from lorac_runtime.cache import check_cache
from lorac_runtime.config import FORMATS, FinetuneConfig, Settings, settings_for
from lorac_runtime.data import LocalData, fingerprint, load_data, split
from lorac_runtime.engines import AUTO
from lorac_runtime.errors import AdapterError, OutputError, listed
from lorac_runtime.fused_files import add_formats, missing_formats
from lorac_runtime.manifest import ADAPTER, BASE, FILE_NAME, Manifest, load, sha256, verify_files
from lorac_runtime.outputs import check_outputs
from lorac_runtime.patch import batchnorm_tensors, check_base
from lorac_runtime.report import FinetuneReport, package_version, read_report
from lorac_runtime.training import Samples


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is known before the engine opens. ``run`` is what a resumed run must share."""

    artifact: Path
    out: Path
    manifest: Manifest
    settings: Settings
    training: Samples
    held_out: Samples
    start: dict[str, npt.NDArray[Any]]
    metadata: dict[str, str]
    run: dict[str, str]
    to: tuple[str, ...]

    @property
    def probe(self) -> Samples:
        """What the model is evaluated on: the held-out images, without any a first batch to see that it is sound."""
        if len(self.held_out):
            return self.held_out
        return dataclasses.replace(self.training, index=self.training.index[: self.settings.batch_size])


def prepared(artifact: Path, data: Path, out: Path, *, config: FinetuneConfig, adapter: Path | None) -> Job:
    """All checks that need no engine."""
    manifest = load(artifact)
    settings = settings_for(manifest, config)
    adapter = None if adapter is None else Path(adapter)
    for name in config.to:
        check_base(artifact, manifest, FORMATS[name])
    check_outputs(artifact, out, manifest, data=data, adapter=adapter, to=config.to)
    verify_files(artifact, manifest)
    required = 2 if manifest.needs_labels else 0
    local = load_data(data, manifest.input, manifest.output.classes, manifest.class_names, require_classes=required)
    if config.cache is not None:
        check_cache(manifest, config.engine, len(local), budget=config.cache, fp16=config.cache_fp16)
    own = load_adapter(artifact / ADAPTER)
    file = own if adapter is None else _other_start(manifest, adapter)
    train, held = split(local, settings.val_fraction, settings.seed)
    samples = Samples(local, train, manifest.input, settings.batch_size, merge_single=manifest.bn_policy == "batch")
    return Job(
        artifact=artifact,
        out=out,
        manifest=manifest,
        settings=settings,
        training=samples,
        held_out=dataclasses.replace(samples, index=held, merge_single=False),
        start=to_manifest_coordinates(manifest, batchnorm_tensors(artifact, manifest), file),
        metadata=_metadata(manifest, own.metadata),
        run=_identity(artifact, local, settings, adapter) | ({"cache_fp16": "True"} if config.cache_fp16 else {}),
        to=config.to,
    )


def _other_start(manifest: Manifest, path: Path) -> AdapterFile:
    if manifest.bn_policy == "recalibrate":
        raise AdapterError(
            f"{path}: an artifact with BN policy recalibrate re-estimates the statistics of its base before it trains, "
            "and these would not be those of the adapted model; leave the adapter out, or export with another policy"
        )
    return load_adapter(path)


def _metadata(manifest: Manifest, start: dict[str, str]) -> dict[str, str]:
    """Metadata of the trained adapter: the artifact's own, now tied to its base."""
    made = {"base_sha256": manifest.files[BASE].sha256, "producer": f"lorac-runtime {package_version()}"}
    return {**start, "coordinates": manifest.coordinates, **made}


def _identity(artifact: Path, local: LocalData, settings: Settings, adapter: Path | None) -> dict[str, str]:
    """What makes a run, as text; equal identities give equal results."""
    return {
        "artifact": sha256(artifact / FILE_NAME),
        "data": fingerprint(local),
        "adapter": "" if adapter is None else sha256(adapter),
        **{name: str(value) for name, value in dataclasses.asdict(settings).items()},
    }


def finished(job: Job, engine: str) -> FinetuneReport | None:
    """The report of the same run, if ``out`` holds it; fused files that it lacks are made from its adapter.

    Raises OutputError if ``out`` holds another run.

    Engines agree to rounding, so which one ran matters only where one was asked for by name.
    """
    report = None if resume.exists(job.out) else read_report(job.out)
    if report is None or not (job.out / ADAPTER).is_file():
        return None
    wanted = report.engine if engine == AUTO else engine
    if (before := report.run | {"engine": report.engine}) != (now := job.run | {"engine": wanted}):
        headline = f"{job.out} holds a finished run of another kind. {resume.ADVICE}; what differs:"
        raise OutputError(listed(headline, resume.differences(before, now)))
    missing = missing_formats(job.out, report, job.to)
    return add_formats(job.artifact, job.out, job.manifest, report, missing) if missing else report
