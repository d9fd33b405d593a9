"""A fine-tuning run on the device: from an artifact and local images to an adapter and a fused model.

The order is: check everything that can be checked, take the accuracy before, train with a checkpoint after every
epoch, take the accuracy after, write adapter.safetensors, the fused files and report.json, drop the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime import resume
from lorac_runtime.adapter import AdapterFile, load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.cache import FeatureCache, check_cache, open_cache
from lorac_runtime.config import FORMATS, FinetuneConfig, Settings, settings_for
from lorac_runtime.data import LocalData, fingerprint, load_data, split
from lorac_runtime.engines import AUTO, Engine, open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, DivergenceError, OutputError, listed
from lorac_runtime.fused_files import add_formats, missing_formats, remove_others, write_fused
from lorac_runtime.manifest import ADAPTER, BASE, FILE_NAME, Manifest, load, sha256, verify_files
from lorac_runtime.outputs import FUSED, check_outputs, remove_partial_files
from lorac_runtime.patch import batchnorm_tensors, check_base
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import (
    FinetuneReport,
    FusedFile,
    package_version,
    peak_memory_bytes,
    read_report,
    versions,
    write_report,
)
from lorac_runtime.training import (
    Evaluation,
    History,
    Inputs,
    OnProgress,
    Progress,
    Samples,
    diverged,
    evaluate,
    train_epoch,
)

__all__ = ["FinetuneConfig", "FinetuneReport", "Progress", "finetune"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Job:
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


def finetune(
    artifact: Path,
    data: Path,
    out: Path,
    config: FinetuneConfig | None = None,
    *,
    adapter: Path | None = None,
    on_progress: OnProgress | None = None,
) -> FinetuneReport:
    """Fine-tune the model of a training artifact on local images; ``out`` gets adapter, fused files and report.

    ``data`` is an .npz file (``images`` uint8, ``labels``) or a folder with one sub-folder of images per class. Where
    the artifact's loss is entropy, labels may be missing; those that are there are used for accuracies only.
    ``adapter`` starts from another adapter file than the artifact's own. ``on_progress`` is called after each step.

    A run that was killed leaves ``out``/checkpoint, and the same call goes on after its last whole epoch, with another
    engine too if ``config.engine`` names one. Where the same run is finished already, its report is returned and
    nothing is done, but to make a fused file that ``config.to`` asks for and that is not there yet. ``config.restart``
    begins anew.

    Raises ArtifactError, OutputError, DataError and AdapterError before any work is done, CheckpointError if ``out``
    holds an unfinished run with other settings, EngineError, DivergenceError; MemoryError where a batch does not fit.
    """
    started, config = time.perf_counter(), config or FinetuneConfig()
    job = _prepared(Path(artifact), Path(data), Path(out), config=config, adapter=adapter)
    if not config.restart and (finished := _finished(job, config.engine)) is not None:
        log.info("%s holds this very run, finished; restart (--restart) runs it again", out)
        return finished
    remove_partial_files(job.out, (ADAPTER, *FUSED.values(), REPORT))
    engine = open_engine(
        job.artifact, job.manifest, engine=config.engine, threads=config.threads, micro_batch=config.micro_batch
    )
    cached = functools.partial(
        open_cache, job.out, engine, job.manifest, job.training, budget=config.cache, fp16=config.cache_fp16
    )
    with contextlib.ExitStack() as held:
        settled = job.manifest.bn_policy != "recalibrate"  # otherwise the frozen part changes before training
        cache = held.enter_context(cached()) if settled else None
        history = _resumed_or_begun(engine, job, _inputs(cache), restart=config.restart)
        cache = cache if settled else held.enter_context(cached())
        started -= history.seconds
        history = _trained(engine, job, history, _inputs(cache), on_progress=on_progress or _ignore)
        return _written(engine, job, history, cache, started=started)


def _inputs(cache: FeatureCache | None) -> Inputs | None:
    return None if cache is None else cache.inputs


def _prepared(artifact: Path, data: Path, out: Path, *, config: FinetuneConfig, adapter: Path | None) -> _Job:
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
    return _Job(
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


def _finished(job: _Job, engine: str) -> FinetuneReport | None:
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


def _resumed_or_begun(engine: Engine, job: _Job, inputs: Inputs | None, *, restart: bool) -> History:
    history = None if restart else resume.load(job.out, engine, job.run)
    if history is not None:
        log.info("resuming after epoch %d of %d", history.epoch, job.settings.epochs)
        return history
    resume.discard(job.out)
    try:
        engine.load_state(job.start)
    except ValueError as err:
        raise AdapterError(str(err)) from err
    if not len(job.held_out):
        log.info("no images are held out: there will be no accuracies")
    elif job.training.data.labels is None:
        log.info("the data have no labels: there will be no accuracies")
    before = evaluate(engine, job.probe, inputs)
    if not math.isfinite(before.loss):
        raise ArtifactError(
            f"the loss is {before.loss} before any training: the base, or the adapter it starts from, is not sound"
        )
    if job.manifest.bn_policy == "recalibrate":
        engine.recalibrate(job.training.images(batch) for batch in job.training.batches())
    return History(before=before)


def _trained(engine: Engine, job: _Job, history: History, inputs: Inputs | None, *, on_progress: OnProgress) -> History:
    """All epochs that are left, with a checkpoint after each."""
    settings = job.settings
    while history.epoch < settings.epochs:
        history = train_epoch(engine, job.training, settings, history, on_progress=on_progress, inputs=inputs)
        if not all(np.all(np.isfinite(value)) for value in engine.state().values()):
            raise DivergenceError(diverged(f"weights are not finite after epoch {history.epoch}", settings))
        resume.save(job.out, engine, job.run, history=history)
    return history


def _written(
    engine: Engine, job: _Job, history: History, cache: FeatureCache | None, *, started: float
) -> FinetuneReport:
    """Accuracy, files and report of a trained model; the report comes last and ends the run."""
    after, state = evaluate(engine, job.probe, _inputs(cache)), engine.state()
    if not math.isfinite(after.loss):
        raise DivergenceError(diverged(f"the loss is {after.loss} after the last step", job.settings))
    remove_others(job.out, job.to)
    save_adapter(job.out / ADAPTER, state, job.metadata)
    fused = write_fused(job.artifact, job.out, state, job.to)
    report = _report(engine, job, history, after=after, fused=fused, seconds=time.perf_counter() - started)
    report = report if cache is None else dataclasses.replace(report, cache=cache.report())
    write_report(job.out, report)
    resume.discard(job.out)
    _warn(report)
    return report


def _report(
    engine: Engine, job: _Job, history: History, *, after: Evaluation, fused: tuple[FusedFile, ...], seconds: float
) -> FinetuneReport:
    manifest = job.manifest
    before = history.before if len(job.held_out) else None
    return FinetuneReport(
        engine=engine.name,
        method=manifest.method,
        model=manifest.model,
        bn_policy=manifest.bn_policy,
        accuracy_before=before.accuracy if before else None,
        accuracy_after=after.accuracy if before else None,
        loss_before=before.loss if before else None,
        loss_after=after.loss if before else None,
        losses=history.losses,
        epoch_losses=history.epoch_losses,
        train_images=len(job.training),
        val_images=len(job.held_out),
        step_seconds=statistics.median(history.step_seconds or (0.0,)),
        seconds=seconds,
        fuse_seconds=sum(file.compute_seconds for file in fused),
        peak_memory_bytes=peak_memory_bytes(),
        trained_parameters=manifest.trained_parameters,
        model_parameters=manifest.model_parameters,
        seed=job.settings.seed,
        settings=job.settings,
        versions=versions(engine.name, engine.version),
        run=job.run,
        fused=fused,
    )


def _warn(report: FinetuneReport) -> None:
    if report.epoch_losses and report.epoch_losses[-1] > report.epoch_losses[0]:
        first, last = report.epoch_losses[0], report.epoch_losses[-1]
        log.warning("the loss rose from %.3g in the first epoch to %.3g: try a lower lr", first, last)
    before, after = report.accuracy_before, report.accuracy_after
    if before is not None and after is not None and after < before:
        log.warning("on held-out images the model got worse, from %.1f to %.1f %%", 100 * before, 100 * after)


def _ignore(progress: Progress) -> None:
    del progress
