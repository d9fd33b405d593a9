"""Is a fused file as fast as its base? By structure first, then by measuring, on one's own files and machine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lorac_deploy.bench.contest import Contest, Effort, Outcome, Say, Timing, hold
from lorac_deploy.bench.equivalence import Equivalence
from lorac_deploy.bench.pairs import BASE, FUSED, SLOWER, Pair, entries, find_pairs
from lorac_deploy.bench.processes import WorkerError
from lorac_deploy.bench.runtimes import Runtime, runtimes
from lorac_exporters.checks import DropinReport
from lorac_runtime.errors import EngineError

Answer = Literal["same", "different", "too noisy"]
STOLEN = 0.02  # of the time: from here on the host's other guests are worth a word
MOST_PYTHONS = "--python PATH names the interpreter of an environment that has one"
DISTRIBUTIONS = {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: ``batch`` samples in a run, ``threads`` of the runtime; ``controls`` takes longer and shows
    that the measurement can tell a slower file from a fast one.
    """

    batch: int = 1
    threads: int = 1
    controls: bool = True
    effort: Effort = dataclasses.field(default_factory=Effort)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.threads < 1:
            raise ValueError(f"batch and threads count from 1, got {self.batch} and {self.threads}")


@dataclasses.dataclass(frozen=True)
class Line:
    """One file on one runtime. ``against`` is None of the base itself."""

    format: str
    runtime: str
    variant: str
    timing: Timing
    against: Equivalence | None


@dataclasses.dataclass(frozen=True)
class LatencyReport:
    """What was found of each pair of files: the structure's proof, the figures, and what they allow to say.

    ``outcome`` is "different" if a fused file differs in structure or in time, "too noisy" if that could not be told
    of one, or a control did not come out slower.
    """

    structures: tuple[DropinReport, ...]
    lines: tuple[Line, ...]
    words: tuple[str, ...]
    outcome: Answer

    def to_dict(self) -> dict[str, Any]:
        """For JSON; single times are left out."""
        lines = [dataclasses.asdict(line) for line in self.lines]
        for line in lines:
            del line["timing"]["samples"]
        structures = [report.to_dict() for report in self.structures]
        return {"outcome": self.outcome, "words": list(self.words), "lines": lines, "structures": structures}


def latency(
    base: Path, fused: Path, interpreters: Sequence[Path], settings: Settings, *, say: Say = lambda _: None
) -> LatencyReport:
    """Compare ``fused`` with ``base``: an artifact's folder and one of fused files, or two model files.

    ``interpreters`` are those of the environments whose runtimes are to be measured.

    Raises ArtifactError for files that cannot be compared, EngineError if no environment has a runtime for them.

    >>> import sys
    >>> report = latency(Path("artifact"), Path("adapted"), [Path(sys.executable)], Settings())  # doctest: +SKIP
    >>> report.outcome  # doctest: +SKIP
    'same'
    """
    pairs = find_pairs(base, fused)
    available = runtimes(interpreters)
    _check_runtimes(pairs, available)
    found = [_measured(pair, available, settings, say) for pair in pairs]
    words = [word for one in found for word in one.words]
    outcomes = {one.outcome for one in found}
    answers: tuple[Answer, ...] = ("different", "too noisy", "same")
    return LatencyReport(
        tuple(report for one in found for report in one.structures),
        tuple(line for one in found for line in one.lines),
        tuple(words),
        next(answer for answer in answers if answer in outcomes),
    )


def _check_runtimes(pairs: Sequence[Pair], available: Sequence[Runtime]) -> None:
    formats = {pair.format for pair in pairs}
    if not formats & {runtime.format for runtime in available}:
        wanted = " or ".join(DISTRIBUTIONS[kind] for kind in sorted(formats))
        raise EngineError(f"no runtime for these files is installed here: install {wanted}, or {MOST_PYTHONS}")


def _measured(pair: Pair, available: Sequence[Runtime], settings: Settings, say: Say) -> LatencyReport:
    structure = pair.structure()
    words = [] if structure.ok else [f"{pair.fused} is NOT a drop-in for {pair.base}: {failures(structure)}"]
    fitting = [runtime for runtime in available if runtime.format == pair.format]
    if not fitting:
        lacking = DISTRIBUTIONS[pair.format]
        words.append(f"{pair.fused} was not measured: no {lacking} is installed here; {MOST_PYTHONS}")
    lines: list[Line] = []
    answers: set[Answer] = {"same" if structure.ok else "different"}
    with tempfile.TemporaryDirectory() as scratch:
        files, note = entries(pair, Path(scratch), batch=settings.batch, with_controls=settings.controls)
        words += [note] if note else []
        for runtime in fitting:
            contest = Contest(pair.format, runtime.interpreter, tuple(files), settings.threads)
            outcome = _held(contest, runtime, settings.effort, say)
            lines += _lines(pair.format, runtime, outcome)
            said = list(judged(str(runtime), pair.fused.name, outcome))
            words += [text for _, text in said]
            answers |= {answer for answer, _ in said}
    order: tuple[Answer, ...] = ("different", "too noisy", "same")
    return LatencyReport((structure,), tuple(lines), tuple(words), next(a for a in order if a in answers))


def _held(contest: Contest, runtime: Runtime, effort: Effort, say: Say) -> Outcome:
    try:
        return hold(contest, effort, lambda text: say(f"{runtime}: {text}"))
    except WorkerError as err:
        raise EngineError(f"{runtime} ({runtime.interpreter}) cannot run {contest.entries[0].path}: {err}") from err


def _lines(kind: str, runtime: Runtime, outcome: Outcome) -> list[Line]:
    return [Line(kind, str(runtime), n, t, outcome.against.get(n)) for n, t in outcome.timings.items()]


def failures(report: DropinReport) -> str:
    """The checks that failed, with their evidence."""
    return "; ".join(f"{c.name}: {c.detail}" for c in report.checks if c.verdict == "fail") or "nothing was checked"


def judged(runtime: str, name: str, outcome: Outcome) -> Iterator[tuple[Answer, str]]:
    """What an outcome allows to say of the fused file ``name``, and of the controls."""
    for variant, reason in outcome.refused.items():
        answer: Answer = "different" if variant == FUSED else "same"
        yield answer, f"{runtime} could not run {name if variant == FUSED else variant}: {reason}"
    if outcome.control.verdict == "different":
        yield (
            "too noisy",
            f"{runtime}: two copies of {BASE} itself came out at {outcome.control.ratio:.3f} of each other: on this "
            "machine, now, the figures tell nothing",
        )
    if FUSED in outcome.against:
        yield from _of_fused(runtime, name, outcome)
    for control in [c for c in SLOWER if c in outcome.against]:
        test = outcome.against[control]
        if test.verdict != "different" or test.ratio < 1:
            yield (
                "too noisy",
                f"{runtime}: the control '{control}' should be slower than {BASE} and came out at {test.ratio:.3f} "
                f"({test.verdict}): on this machine, now, the figures tell nothing",
            )


def _of_fused(runtime: str, name: str, outcome: Outcome) -> Iterator[tuple[Answer, str]]:
    test = outcome.against[FUSED]
    span = f"{test.ratio:.4f} of {BASE}'s time, between {test.low:.4f} and {test.high:.4f}"
    percent = f"{test.margin:.0%}"
    if test.verdict == "same":
        yield "same", f"{runtime}: {name} is as fast as {BASE} within {percent} ({span})"
    elif test.verdict == "different":
        hint = "; where structure is equal, numbers can cost time too: look for subnormal ones, or an overflow"
        yield "different", f"{runtime}: {name} takes {span}{hint}"
    else:
        yield (
            "too noisy",
            f"{runtime}: too noisy to tell within {percent} ({span}) after {outcome.processes} processes; "
            f"{_disturbance(outcome)}end other programs, or measure longer with --processes",
        )


def _disturbance(outcome: Outcome) -> str:
    """What is known to have disturbed."""
    found = f"the load was {outcome.load:.1f} before it began, "
    return found + (
        f"{outcome.stolen:.0%} of the time went to other guests of the host, " if outcome.stolen > STOLEN else ""
    )
