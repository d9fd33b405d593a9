"""Adapting a model that stays in place: train from the current generation, and keep the result only if it is better."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorac_runtime import generations as gen
from lorac_runtime import state as states
from lorac_runtime.adapter import save_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import load_data
from lorac_runtime.errors import CheckpointError, DataError, DivergenceError, OutputError
from lorac_runtime.files import locked, output_folder
from lorac_runtime.fused_files import write_fused
from lorac_runtime.gate import Answers, GateConfig, Verdict, judged
from lorac_runtime.generations import Record
from lorac_runtime.job import Job, prepared, start_of
from lorac_runtime.judging import logits
from lorac_runtime.limits import Clock
from lorac_runtime.manifest import ADAPTER, ANCHORS, Manifest, load
from lorac_runtime.outputs import FUSED, check_place
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import FinetuneReport, read_report
from lorac_runtime.session import ignore, run
from lorac_runtime.tasks import require_classifier
from lorac_runtime.training import OnProgress, Samples
from lorac_runtime.trust import require_signed

__all__ = ["Adaptation", "adapt"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What came of an attempt: its ``verdict``, the ``generation`` that is in place now, and the run's report.

    ``report`` is None where the attempt was not accepted: its files are gone. ``repeated``: the very same attempt was
    made before, and nothing was done.
    """

    verdict: Verdict
    generation: int
    report: FinetuneReport | None = None
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """All that an attempt needs to know. ``identity`` is what a repeated one has in common with it."""

    folder: Path
    record: Record
    parent: int
    job: Job
    identity: dict[str, str]
    config: FinetuneConfig
    gate: GateConfig


def adapt(
    artifact: Path,
    data: Path,
    state: Path,
    config: FinetuneConfig | None = None,
    gate: GateConfig | None = None,
    *,
    keep: int = 3,
    on_progress: OnProgress = ignore,
    on_begin: Callable[[], None] | None = None,
) -> Adaptation:
    """Fine-tune the model in place in the folder ``state``, and put the result in its place if it is better.

    The folder is made where it is missing, and then the artifact's own model is in place. ``state``/adapter.safetensors
    and ``state``/fused.FORMAT are always those of the generation in place; ``keep`` generations are kept. The same call
    goes on with an attempt that was cut off. It does not repeat one that came to an end, unless ``config.restart``.
    ``on_begin`` is called once the state is open and locked, and all is checked.

    Raises what `lorac_runtime.session.finetune` raises, but no DivergenceError, which is a reason not to accept, nor
    CheckpointError, since an attempt with other data or settings begins anew; DataError where labels or held-out
    samples are missing; StateError for a state that is damaged, or another artifact's.
    """
    config, gate = config or FinetuneConfig(), gate or GateConfig()
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    clock = Clock(config.checkpoint_every, config.time_budget)
    artifact, data, state = Path(artifact), Path(data), Path(state)
    check_place(artifact, state, data)
    with locked(output_folder(state)):
        attempt = _opened(artifact, data, state, config, gate)
        _prune(attempt, keep)
        if on_begin is not None:
            on_begin()
        if not config.restart and (before := _repeated(attempt)) is not None:
            return before
        return _made(attempt, clock, on_progress, keep)


def _opened(artifact: Path, data: Path, state: Path, config: FinetuneConfig, gate: GateConfig) -> _Attempt:
    """The state, with a model in place, and what is to be tried."""
    if config.trust is not None:
        require_signed(artifact, config.trust)
    manifest = load(artifact)
    why = "whether a model became better is told by samples that it classifies rightly"
    require_classifier(
        artifact, manifest.task, why, "leave --keep-if-better out, and compare the figures of report.json"
    )
    formats = tuple(dict.fromkeys(("onnx", *config.to)))  # the gate asks fused.onnx
    record = states.recover(state, states.open_state(state, manifest, formats))
    if record.accepted < 0:
        record = _first(state, record, artifact, manifest)
    parent = gen.current(state)
    assert parent is not None
    gen.read_generation(state, parent)
    trained = parent > 0 and manifest.bn_policy != "recalibrate"  # which counts statistics from the base
    start = gen.path_of(state, parent) / ADAPTER if trained else None
    config = dataclasses.replace(config, to=formats)
    job = prepared(artifact, data, state / states.ATTEMPT, config=config, adapter=start)
    _require_judgeable(job, data)
    identity = {name: value for name, value in job.run.items() if name != "adapter"}
    identity |= {name: str(value) for name, value in dataclasses.asdict(gate).items()}
    return _Attempt(state, record, parent, dataclasses.replace(job, home=state), identity, config, gate)


def _require_judgeable(job: Job, data: Path) -> None:
    """Raise DataError where it cannot be told whether a model became better."""
    if job.training.data.labels is None:
        raise DataError(f"{data} has no labels: without them nothing tells whether a model became better")
    if not len(job.held_out):
        raise DataError("no samples are held out to tell whether a model became better: use a --val-fraction above 0")


def _first(folder: Path, record: Record, artifact: Path, manifest: Manifest) -> Record:
    """Generation 0: the artifact's own model, as files."""
    states.discard_attempt(folder)
    home = output_folder(folder / states.ATTEMPT)
    start, metadata = start_of(artifact, manifest)
    save_adapter(home / ADAPTER, start, metadata)
    write_fused(artifact, home, start, record.formats)
    gen.describe(home, 0, None, states.names(record), {}, None)
    return states.recover(folder, record)


def _repeated(attempt: _Attempt) -> Adaptation | None:
    """What came of the very same attempt, if it was the last one."""
    last = states.rejected(attempt.folder)
    if last is not None:
        verdict = last.verdict if last.run == attempt.identity else None
    elif attempt.record.accepted in gen.numbers(attempt.folder):
        newest = gen.entry(gen.path_of(attempt.folder, attempt.record.accepted) / gen.ENTRY)
        verdict = newest.verdict if newest.run == attempt.identity else None
    else:
        verdict = None
    if verdict is None:
        return None
    states.discard_attempt(attempt.folder)
    log.info("this very attempt was made before; --restart makes it again")
    return Adaptation(verdict, attempt.parent, repeated=True)


def _prune(attempt: _Attempt, keep: int) -> None:
    """Remove what is too old. After a rollback nothing is, until the next generation is accepted."""
    if gen.current(attempt.folder) == attempt.record.accepted:
        states.prune(attempt.folder, keep)


def _made(attempt: _Attempt, clock: Clock, on_progress: OnProgress, keep: int) -> Adaptation:
    try:
        report = _trained(attempt, clock, on_progress)
    except DivergenceError as err:
        verdict = Verdict(accepted=False, reasons=(str(err).splitlines()[0],))
        return _kept_old(attempt, verdict)
    verdict = _judged(attempt)
    if not verdict.accepted:
        return _kept_old(attempt, verdict)
    folder, number = attempt.folder, attempt.record.accepted + 1
    files = (*states.names(attempt.record), REPORT)
    gen.describe(folder / states.ATTEMPT, number, attempt.parent, files, attempt.identity, verdict)
    states.recover(folder, attempt.record)
    states.prune(folder, keep)
    return Adaptation(verdict, number, report)


def _trained(attempt: _Attempt, clock: Clock, on_progress: OnProgress) -> FinetuneReport:
    """Train in the attempt's folder, on from a checkpoint that is there."""
    if (attempt.job.out / REPORT).exists() and not _is_of(attempt.job, attempt.job.out):
        states.discard_attempt(attempt.folder)
        output_folder(attempt.job.out)
    try:
        return run(attempt.job, attempt.config, clock, on_progress=on_progress)
    except CheckpointError as err:
        log.warning("the unfinished attempt is given up and begins anew: %s", str(err).splitlines()[0])
        anew = dataclasses.replace(attempt.config, restart=True)
        return run(attempt.job, anew, clock, on_progress=on_progress)


def _is_of(job: Job, out: Path) -> bool:
    """Whether the finished run in ``out`` is this one."""
    try:
        report = read_report(out)
    except OutputError:
        return False
    return report is not None and report.run == job.run


def _kept_old(attempt: _Attempt, verdict: Verdict) -> Adaptation:
    states.reject(attempt.folder, attempt.identity, verdict)
    return Adaptation(verdict, attempt.parent)


def _judged(attempt: _Attempt) -> Verdict:
    held_out, anchors = attempt.job.held_out, _anchors(attempt.job)
    return judged(_answers(attempt, held_out), None if anchors is None else _answers(attempt, anchors), attempt.gate)


def _answers(attempt: _Attempt, samples: Samples) -> Answers:
    """Those of the files in place and of the new ones, as an app would load them."""
    at_once = attempt.job.micro_batch or samples.batch_size
    before, after = (
        logits(home / FUSED["onnx"], attempt.job.manifest, samples, threads=attempt.config.threads, at_once=at_once)
        for home in (gen.path_of(attempt.folder, attempt.parent), attempt.job.out)
    )
    return Answers(before, after, samples.data.known_labels()[samples.index])


def _anchors(job: Job) -> Samples | None:
    """The artifact's own samples, if it has some."""
    spec, output, names = job.manifest.input, job.manifest.output, job.manifest.class_names
    if ANCHORS not in job.manifest.files:
        return None
    data = load_data(job.artifact / ANCHORS, spec, output.classes, names, require_classes=1)
    return Samples(data, np.arange(len(data)), spec, job.settings.batch_size)
