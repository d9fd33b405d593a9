"""What a fine-tuning run is, settled before any work: artifact, data, settings, and whether it is done already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lorac_runtime import resume
from lorac_runtime.adapter import AdapterFile, load_adapter, most_bytes, to_manifest_coordinates
from lorac_runtime.cache import check_cache
from lorac_runtime.config import FORMATS, FinetuneConfig, Settings, settings_for
from lorac_runtime.data import LocalData, fingerprint, split
from lorac_runtime.engines import AUTO
from lorac_runtime.errors import AdapterError, LimitError, OutputError, listed
from lorac_runtime.external_data import require_own_data
from lorac_runtime.fused_files import add_formats, missing_formats
from lorac_runtime.limits import ENGINE, pieces_within
from lorac_runtime.manifest import ADAPTER, BASE, FILE_NAME, Manifest, load, sha256, verify_files
from lorac_runtime.outputs import check_outputs
from lorac_runtime.patch import batchnorm_tensors, check_base
from lorac_runtime.report import FinetuneReport, read_report
from lorac_runtime.task_data import load_local
from lorac_runtime.training import Samples
from lorac_runtime.trust import require_signed
from lorac_runtime.version import __version__


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
    micro_batch: int | None = None
    home: Path | None = None

    @property
    def cache_home(self) -> Path:
        """Where a cache lies: in ``home``, which outlives ``out``, if there is one."""
        return self.home or self.out

    @property
    def probe(self) -> Samples:
        """What the model is evaluated on: the held-out images, without any a first batch to see that it is sound."""
        if len(self.held_out):
            return self.held_out
        return dataclasses.replace(self.training, index=self.training.index[: self.settings.batch_size])


def prepared(artifact: Path, data: Path, out: Path, *, config: FinetuneConfig, adapter: Path | None) -> Job:
    """All checks that need no engine."""
    if config.trust is not None:
        require_signed(artifact, config.trust)
    manifest = load(artifact)
    settings = settings_for(manifest, config)
    adapter = None if adapter is None else Path(adapter)
    for name in config.to:
        check_base(artifact, manifest, FORMATS[name])
    check_outputs(artifact, out, manifest, data=data, adapter=adapter, to=config.to)
    verify_files(artifact, manifest)
    require_own_data(artifact, manifest)
    local = load_local(data, manifest)
    if config.cache is not None:
        check_cache(manifest, config.engine, len(local), budget=config.cache, fp16=config.cache_fp16)
    start, metadata = start_of(artifact, manifest, adapter)
    train, held = split(local, settings.val_fraction, settings.seed)
    merge, loss = manifest.bn_policy == "batch", manifest.training.loss
    samples = Samples(local, train, manifest.input, settings.batch_size, merge, manifest.task, loss)
    return Job(
        artifact=artifact,
        out=out,
        manifest=manifest,
        settings=settings,
        training=samples,
        held_out=dataclasses.replace(samples, index=held, merge_single=False),
        start=start,
        metadata=metadata,
        run=_identity(artifact, local, settings, adapter) | ({"cache_fp16": "True"} if config.cache_fp16 else {}),
        to=config.to,
        micro_batch=_pieces(manifest, config, settings, local),
    )


def _pieces(manifest: Manifest, config: FinetuneConfig, settings: Settings, local: LocalData) -> int | None:
    """How many images to compute at once: as asked for, or as many as the memory that is allowed can hold."""
    if config.memory is None:
        return config.micro_batch
    if config.engine not in (AUTO, ENGINE):
        raise LimitError(f"the engine {config.engine} cannot keep to --memory: leave it out, or use --engine {ENGINE}")
    return pieces_within(
        manifest, config.memory, batch=settings.batch_size, data=local.nbytes, asked=config.micro_batch
    )


def start_of(
    artifact: Path, manifest: Manifest, adapter: Path | None = None
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """What training starts from, the artifact's own adapter or another one, and the metadata of what comes of it.

    Raises AdapterError if it is damaged or does not fit.
    """
    own = load_adapter(artifact / ADAPTER)
    file = own if adapter is None else _other_start(manifest, adapter)
    start = to_manifest_coordinates(manifest, batchnorm_tensors(artifact, manifest), file)
    return start, _metadata(manifest, own.metadata)


def _other_start(manifest: Manifest, path: Path) -> AdapterFile:
    if manifest.bn_policy == "recalibrate":
        raise AdapterError(
            f"{path}: an artifact with BN policy recalibrate re-estimates the statistics of its base before it trains, "
            "and these would not be those of the adapted model; leave the adapter out, or export with another policy"
        )
    return load_adapter(path, most=most_bytes(manifest))


def _metadata(manifest: Manifest, start: dict[str, str]) -> dict[str, str]:
    """Metadata of the trained adapter: the artifact's own, now tied to its base."""
    made = {"base_sha256": manifest.files[BASE].sha256, "producer": f"lorac-runtime {__version__}"}
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
