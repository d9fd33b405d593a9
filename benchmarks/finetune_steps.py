"""Time of a step and of an epoch: competitors step the same network on the same batch, in interleaved rounds.

All start from the same numbers (the first losses are compared), with AdamW and clipping where the competitor has it.
Their processes wait on a pipe while another computes. Not counted: loading, compiling, and preparing the images of
single steps; an epoch holds everything from raw images in memory to the new weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from benchmarks import step_rounds as sr
from benchmarks.command import Say
from benchmarks.finetune_cases import Effort, Point, compared, noted, refused, row
from benchmarks.finetune_peak import Peak
from benchmarks.rows import Row
from benchmarks.step_cases import Case
from benchmarks.step_competitors import FLOOR, FORWARD_WORKER, REFERENCE, RUNTIME_WORKER, SIMPLIFIED, Competitor
from benchmarks.step_process import Session, WorkerError, Workers
from benchmarks.step_protocol import Run
from lorac_exporters.costs import artifact_costs, multiply_adds
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.manifest import BASE

SETTLE = 0.02  # seconds: threads of an OpenMP team spin for some milliseconds after their work
EPOCHS = 3  # the first, which opens sessions and fills caches, and two later ones
EPOCH = {"epoch": "s"}
Seconds = dict[str, list[list[float]]]


@dataclasses.dataclass
class Measured:
    """A point while it is measured: open trainings, first losses, seconds by round and step, and who refused why."""

    sessions: dict[str, Session] = dataclasses.field(default_factory=dict)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    typical: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: Seconds = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        """Note why a competitor is not measured any further."""
        self.refused[name] = reason
        self.sessions.pop(name, None)
        self.seconds.pop(name, None)


def rows(workers: Workers, case: Case, point: Point, effort: Effort, *, peak: Peak, say: Say) -> list[Row]:
    """Measure all competitors of a point."""
    found = Measured()
    say(f"{point.title}: opening {len(point.competitors)} competitors")
    try:
        opened(found, workers, case, point, effort)
        made = rounds(found, effort)
        say(f"{point.title}: {made} rounds done, {len(found.refused)} refused")
        measured = [*step_rows(found, case, point, peak), *compile_rows(found, point)]
        epochs: list[Row] = []
        for competitor in point.competitors:
            if competitor.label in found.refused:
                measured += refused(point, competitor, found.refused[competitor.label], {"step": "s"})
            elif point.epoch_images:
                epochs += epoch_rows(found, case, point, competitor)
        return [*measured, *compared(epochs)]
    finally:
        closed(found)


def opened(found: Measured, workers: Workers, case: Case, point: Point, effort: Effort) -> None:
    """Load all of them, each alone, and let each make its first steps."""
    for competitor in point.competitors:
        name = competitor.label
        try:
            session = workers.open(competitor, case, batch=point.batch, threads=point.threads)
            first = session.ask("step", count=effort.warmup)
        except (WorkerError, FileNotFoundError, RuntimeError, LoracDeployError) as err:
            found.drop(name, str(err))
            continue
        found.sessions[name] = session
        found.losses[name], found.typical[name] = first["losses"][0], min(first["seconds"])


def rounds(found: Measured, effort: Effort) -> int:
    """As many as the effort allows; returns how many."""
    cost = sum((effort.steps + 1) * seconds + SETTLE for seconds in found.typical.values())
    count = max(effort.least, min(effort.most, int(effort.seconds / cost))) if found.typical else 0
    found.seconds = {name: [] for name in found.sessions}
    for order in sr.orders(list(found.sessions), count) if found.sessions else ():
        for name in [name for name in order if name in found.sessions]:
            try:
                found.seconds[name].append(turn(found.sessions[name], effort.steps))
            except WorkerError as err:
                found.drop(name, str(err))
    return count


def turn(session: Session, count: int) -> list[float]:
    """Seconds of ``count`` steps, after one that brings the worker's memory back into the caches."""
    time.sleep(SETTLE)
    seconds: list[float] = session.ask("step", count=count + 1)["seconds"]
    return seconds[1:]


def closed(found: Measured) -> None:
    """Forget all trainings, so that the next point finds memory."""
    for session in found.sessions.values():
        with contextlib.suppress(WorkerError):
            session.ask("close")


def step_rows(found: Measured, case: Case, point: Point, peak: Peak) -> Iterator[Row]:
    """A row for the step of each competitor, and one for its distance to the floor."""
    apart = sr.disagreeing(found.losses, REFERENCE) if REFERENCE in found.losses else []
    for competitor in point.competitors:
        if competitor.label not in found.seconds:
            continue
        sound = competitor.label not in apart
        made = _step_row(found, point, competitor, comparable=sound)
        work = _work(case, competitor, point.batch)
        more = {"multiply-adds": work} | peak.share(work, made.figure, point.threads) if work else {}
        yield dataclasses.replace(made, details={**made.details, **more})
        if sound and FLOOR in found.seconds and competitor.label != FLOOR:
            yield _distance(found, point, competitor)


def _step_row(found: Measured, point: Point, competitor: Competitor, *, comparable: bool) -> Row:
    name, own = competitor.label, found.seconds[competitor.label]
    summary, session = sr.summary(own), found.sessions[name]
    details: dict[str, object] = {"minimum": summary.minimum, "ninetieth": summary.ninetieth, "steps": summary.steps}
    details |= {"rounds": len(own), "first loss": found.losses[name], "samples": [s for turn in own for s in turn]}
    loss = "" if comparable else f"another loss ({found.losses[name]:.6g}): not the same training"
    made = dataclasses.replace(
        row(point, competitor, "step", summary.median, "s"), note=noted(competitor.note, session.note, loss)
    )
    return _compared(made, details, found, REFERENCE if comparable else "")


def _compared(made: Row, details: Mapping[str, object], found: Measured, reference: str) -> Row:
    if reference not in found.seconds or made.variant == reference:
        return dataclasses.replace(made, details=details)
    ratio = sr.ratio(found.seconds[made.variant], found.seconds[reference])
    more = {"ratio of minima": ratio.minima, "ratio of medians": ratio.medians}
    return dataclasses.replace(made, ratio=ratio.paired, reference=reference, details={**details, **more})


def _distance(found: Measured, point: Point, competitor: Competitor) -> Row:
    ratio = sr.ratio(found.seconds[competitor.label], found.seconds[FLOOR])
    made = row(point, competitor, "step over floor", ratio.paired, "x")
    details = {"ratio of minima": ratio.minima, "ratio of medians": ratio.medians}
    return dataclasses.replace(made, ratio=ratio.paired, reference=FLOOR, details=details)


def _work(case: Case, competitor: Competitor, batch: int) -> int:
    """Multiply-adds of a step by its graphs; 0 where these are not ours, or onnxsim's."""
    own = competitor.options.get("engine", "onnxruntime") == "onnxruntime" and competitor.variant != SIMPLIFIED
    if competitor.worker not in (RUNTIME_WORKER, FORWARD_WORKER) or not own:
        return 0
    folder = case.artifact(competitor.variant)
    if competitor.worker == FORWARD_WORKER:
        return int(competitor.options["passes"]) * multiply_adds(ir.load(folder / BASE), batch)
    costs = artifact_costs(folder, batch)
    return costs.multiply_adds + (0 if competitor.options.get("cache") else costs.prefix_multiply_adds)


def compile_rows(found: Measured, point: Point) -> Iterator[Row]:
    """What torch.compile took."""
    for competitor in point.competitors:
        session = found.sessions.get(competitor.label)
        if session is not None and "compile" in session.facts:
            made = row(point, competitor, "compile", session.facts["compile"], "s")
            yield dataclasses.replace(made, details={"first use of torch.compile": session.facts["first_use"]})
        elif competitor.options.get("compile"):
            yield from refused(point, competitor, found.refused[competitor.label], {"compile": "s"})


def epoch_rows(found: Measured, case: Case, point: Point, competitor: Competitor) -> Sequence[Row]:
    """Seconds of the first epoch and the median of later ones; nothing for what makes no epochs."""
    if competitor.worker == FORWARD_WORKER:
        return ()
    run = Run(str(case.local(point.epoch_images)), EPOCHS, point.batch, lr=1e-5, warmup=0.3)
    try:
        seconds = found.sessions[competitor.label].ask("epochs", run=dataclasses.asdict(run))["seconds"]
    except WorkerError as err:
        return [*refused(point, competitor, str(err), EPOCH)]
    figures = {"first": seconds[0], "later": statistics.median(seconds[1:])}
    made = {which: row(point, competitor, "epoch", figure, "s") for which, figure in figures.items()}
    more = {"images": point.epoch_images}
    return [
        dataclasses.replace(one, settings={**one.settings, **more, "epoch": which}, details={"epochs": seconds})
        for which, one in made.items()
    ]
