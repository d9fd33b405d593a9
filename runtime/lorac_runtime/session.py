"""A fine-tuning run on the device: from an artifact and local images to an adapter and a fused model.

The order is: check everything that can be checked, take the accuracy before, train with a checkpoint now and then,
take the accuracy after, write adapter.safetensors, the fused files and report.json, drop the checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorac_runtime import resume
from lorac_runtime.adapter import save_adapter
from lorac_runtime.cache import FeatureCache, open_cache
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, DivergenceError, StoppedError
from lorac_runtime.files import locked
from lorac_runtime.fused_files import remove_others, write_fused
from lorac_runtime.job import Job, finished, prepared
from lorac_runtime.limits import Clock
from lorac_runtime.manifest import ADAPTER
from lorac_runtime.outputs import FUSED, remove_partial_files
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import FinetuneReport, FusedFile, peak_memory_bytes, versions, write_report
from lorac_runtime.training import (
    Evaluation,
    History,
    Inputs,
    OnProgress,
    Progress,
    diverged,
    evaluate,
    exploded,
    train_epoch,
)

__all__ = ["FinetuneConfig", "FinetuneReport", "Progress", "finetune"]

log = logging.getLogger(__name__)
OnEpoch = Callable[[Engine, History], None]


def finetune(
    artifact: Path,
    data: Path,
    out: Path,
    config: FinetuneConfig | None = None,
    *,
    adapter: Path | None = None,
    on_progress: OnProgress | None = None,
    on_epoch: OnEpoch | None = None,
) -> FinetuneReport:
    """Fine-tune the model of a training artifact on local images; ``out`` gets adapter, fused files and report.

    ``data`` is an .npz file (``images`` uint8, ``labels``) or a folder with one sub-folder of images per class. Where
    the artifact's loss is entropy, labels may be missing; those that are there are used for accuracies only.
    ``adapter`` starts from another adapter file than the artifact's own. ``on_progress`` is called after each step,
    ``on_epoch`` after each epoch, to look at the model as it is then.

    A run that was killed leaves ``out``/checkpoint, and the same call goes on from there, with another engine too if
    ``config.engine`` names one. Where the same run is finished already, its report is returned and
    nothing is done, but to make a fused file that ``config.to`` asks for and that is not there yet. ``config.restart``
    begins anew.

    Raises ArtifactError, OutputError, DataError and AdapterError before any work is done, BusyError if another process
    works in ``out``, CheckpointError if it holds an unfinished run with other settings, EngineError, DivergenceError;
    StoppedError at a checkpoint when ``config.time_budget`` is used up; MemoryError where a batch does not fit.
    """
    config = config or FinetuneConfig()
    clock = Clock(config.checkpoint_every, config.time_budget)
    job = prepared(Path(artifact), Path(data), Path(out), config=config, adapter=adapter)
    with locked(job.out):
        return run(job, config, clock, on_progress=on_progress or ignore, on_epoch=on_epoch)


def run(
    job: Job,
    config: FinetuneConfig,
    clock: Clock,
    *,
    on_progress: OnProgress,
    on_epoch: OnEpoch | None = None,
) -> FinetuneReport:
    """`finetune` of what is prepared, in an output folder that is locked. Raises what `finetune` raises."""
    started = time.perf_counter()
    if not config.restart and (before := finished(job, config.engine)) is not None:
        log.info("%s holds this very run, finished; restart (--restart) runs it again", job.out)
        resume.discard(job.out)  # it may have been killed while it removed its checkpoints
        return before
    remove_partial_files(job.out, (ADAPTER, *FUSED.values(), REPORT))
    engine = open_engine(
        job.artifact, job.manifest, engine=config.engine, threads=config.threads, micro_batch=job.micro_batch
    )
    cached = functools.partial(
        open_cache, job.cache_home, engine, job.manifest, job.training, budget=config.cache, fp16=config.cache_fp16
    )
    with contextlib.ExitStack() as held:
        settled = job.manifest.bn_policy != "recalibrate"  # otherwise the frozen part changes before training
        cache = held.enter_context(cached()) if settled else None
        history = _resumed_or_begun(engine, job, _inputs(cache), restart=config.restart)
        cache = cache if settled else held.enter_context(cached())
        started -= history.seconds
        watch = functools.partial(_told, on_epoch, engine)
        history = _trained(engine, job, history, _inputs(cache), clock, on_progress=on_progress, on_epoch=watch)
        return _written(engine, job, history, cache, started=started)


def _inputs(cache: FeatureCache | None) -> Inputs | None:
    return None if cache is None else cache.inputs


def _resumed_or_begun(engine: Engine, job: Job, inputs: Inputs | None, *, restart: bool) -> History:
    history = None if restart else resume.load(job.out, engine, job.run)
    if history is not None:
        if history.position:
            log.info(
                "resuming after step %d, in epoch %d of %d", len(history.losses), history.epoch + 1, job.settings.epochs
            )
        else:
            log.info("resuming after epoch %d of %d", history.epoch, job.settings.epochs)
        return history
    resume.discard(job.out)
    try:
        engine.load_state(job.start)
    except ValueError as err:
        raise AdapterError(str(err)) from err
    if not len(job.held_out):
        log.info("no samples are held out: there will be no accuracies")
    elif not job.training.labelled:
        log.info("the data have no labels: there will be no accuracies")
    before = evaluate(engine, job.probe, inputs)
    if not math.isfinite(before.loss):
        raise ArtifactError(
            f"the loss is {before.loss} before any training: the base, or the adapter it starts from, is not sound"
        )
    if job.manifest.bn_policy == "recalibrate":
        engine.recalibrate(job.training.images(batch) for batch in job.training.batches())
    return History(before=before)


def _trained(
    engine: Engine,
    job: Job,
    history: History,
    inputs: Inputs | None,
    clock: Clock,
    *,
    on_progress: OnProgress,
    on_epoch: Callable[[History], None],
) -> History:
    """All that is left of training, with a checkpoint after each epoch and whenever the clock says so."""
    settings = job.settings
    while history.epoch < settings.epochs:
        history = train_epoch(
            engine, job.training, settings, history, on_progress=on_progress, inputs=inputs, pause=clock.due
        )
        _require_sound(engine, job, history)
        resume.save(job.out, engine, job.run, history=history)
        clock.saved()
        if not history.position:
            on_epoch(history)
        if clock.over and history.epoch < settings.epochs:
            raise StoppedError(f"the time is up after step {len(history.losses)}; the same command goes on")
    return history


def _require_sound(engine: Engine, job: Job, history: History) -> None:
    """Raise DivergenceError where weights are not finite, or the loss is far above that of random answers."""
    if not all(np.all(np.isfinite(value)) for value in engine.state().values()):
        raise DivergenceError(diverged(f"weights are not finite after step {len(history.losses)}", job.settings))
    if exploded(history, job.manifest.output.classes):
        loss = (
            f"{history.epoch_losses[-1]:.3g} in epoch {history.epoch}, from {history.losses[0]:.3g} in the first step"
        )
        raise DivergenceError(diverged(f"the mean loss rose to {loss}", job.settings))


def _written(
    engine: Engine, job: Job, history: History, cache: FeatureCache | None, *, started: float
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
    engine: Engine, job: Job, history: History, *, after: Evaluation, fused: tuple[FusedFile, ...], seconds: float
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
        mean_iou_before=before.mean_iou if before else None,
        mean_iou_after=after.mean_iou if before else None,
        error_before=before.error if before else None,
        error_after=after.error if before else None,
        task=manifest.kind,
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
        log.warning("on held-out samples the model got worse, from %.1f to %.1f %%", 100 * before, 100 * after)


def ignore(progress: Progress) -> None:
    """Shows nothing."""
    del progress


def _told(on_epoch: OnEpoch | None, engine: Engine, history: History) -> None:
    if on_epoch is not None:
        on_epoch(engine, history)
