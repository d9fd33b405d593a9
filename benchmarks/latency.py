"""Is a fused file as fast as its base? Proved by structure, then measured on every runtime, with controls beside it.

ResNet-18 and MobileNetV2 in full (two batch sizes, ONNX and TFLite, three precisions, all controls, planted faults, and
the files of other converters, which are the same within 3 %); other networks as base and fused in float32. Older
runtimes, onnxruntime 1.19.2 and tflite-runtime, run the first two in float32, at the first batch size.
`lorac_deploy.bench.contest` says how it is measured. Images are as large as the networks' names say. Not counted:
loading and first runs, which have rows of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import interpreters as envs
from benchmarks.command import common_options, finish
from benchmarks.latency_files import EXTRA_NODE, OTHERS, UNFOLDED, Subject
from benchmarks.latency_pooled import POOLED, pooled
from benchmarks.networks import network, parsed
from benchmarks.rows import Row
from lorac_deploy.bench.contest import QUICK, Contest, Effort, Entry, Outcome, hold
from lorac_deploy.bench.pairs import BASE, BRANCH, FUSED, INPUTS, UNMERGED
from lorac_deploy.bench.processes import WorkerError
from lorac_exporters.checks import DropinReport
from lorac_exporters.tflite_config import WEIGHTS, Weights

Say = Callable[[str], None]
RUNTIMES = {"onnx": (envs.RUNTIME, envs.TRAINING), "tflite": (envs.LITERT, envs.TFLITE_RUNTIME)}  # the newest first
FULL = ("resnet18:128:1", "resnet18:64:8", "mobilenet_v2:96")
MORE = ("resnet34:128", "resnet50:128", "resnet101:128", "mobilenet_v3_large:160", "resnet8:32")
MUST = {FUSED: "same", INPUTS: "different", BRANCH: "different", EXTRA_NODE: "different", UNFOLDED: "different"}
JUDGED = ("latency", POOLED)
OTHERS_MARGIN = 0.03  # a file of another converter is the same within 3 %: it may order its work otherwise
NOT_IN_TFLITE = {
    UNMERGED: "a .tflite file stores one weight a layer: adapters are merged when it is written",
    INPUTS: "a .tflite file stores one weight a layer: adapters cannot be inputs of it",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured. ``full`` networks have all variants, ``others`` base and fused in float32 at batch 1.

    They are given as NAME:PIXELS, those in full also with batch sizes of their own, NAME:PIXELS:BATCH,BATCH.
    """

    full: tuple[str, ...] = FULL
    others: tuple[str, ...] = MORE
    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[Weights, ...] = WEIGHTS
    threads: int = 1
    converters: tuple[str, ...] = (envs.LITERT_TORCH, envs.ONNXSIM)
    effort: Effort = dataclasses.field(default_factory=Effort)
    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: one small network in float32."""
        return cls(("mobilenet_v2:96",), (), (1,), ("float32",), converters=(), effort=QUICK, quick=True, python=python)


@dataclasses.dataclass(frozen=True)
class Case:
    """One format, precision and batch size of a network."""

    subject: Subject
    format: str
    precision: Weights
    batch: int
    full: bool

    def __str__(self) -> str:
        return f"{self.subject.network.name} {self.format} {self.precision}, batch {self.batch}"


def rows(settings: Settings, say: Say) -> list[Row]:
    """Every case on its runtimes."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for text in (*settings.full, *settings.others):
            say(f"making the files of {text}")
            name, own = sized(text)
            subject = Subject(network(name), Path(scratch) / text.replace(":", "-"))
            batches = own or (settings.batches if text in settings.full else settings.batches[:1])
            for case in cases(subject, settings, batches, full=text in settings.full):
                found += case_rows(case, settings, say)
    return [*found, *pooled(found)]


def sized(text: str) -> tuple[str, tuple[int, ...]]:
    """(NAME:PIXELS, batch sizes) of NAME:PIXELS:BATCH,BATCH; no batch sizes if it gives none.

    >>> sized("resnet18:64:1,8"), sized("resnet18:64")
    (('resnet18:64', (1, 8)), ('resnet18:64', ()))

    Raises ValueError for another text.
    """
    name = ":".join(text.split(":")[:2])
    parsed(name)
    batches = text[len(name) + 1 :].split(",") if text != name else []
    if not all(batch.isdecimal() and int(batch) for batch in batches):
        raise ValueError(f"{text}: expected NAME:PIXELS or NAME:PIXELS:BATCH,BATCH, such as resnet18:64:1,8")
    return name, tuple(map(int, batches))


def cases(subject: Subject, settings: Settings, batches: Sequence[int], *, full: bool) -> Iterator[Case]:
    """The cases of one network."""
    precisions: tuple[Weights, ...] = settings.precisions if full else ("float32",)
    for kind in RUNTIMES:
        for precision in precisions:
            for batch in batches:
                yield Case(subject, kind, precision, batch, full)


def case_rows(case: Case, settings: Settings, say: Say) -> list[Row]:
    """One case on its runtimes, the structure's proof beside each figure."""
    files = case.subject.files(case.format, case.precision, full=case.full)
    reports = {v: case.subject.structure(case.format, case.precision, files, v) for v in files if v != BASE}
    structures = {BASE: "", **{variant: in_words(report) for variant, report in reports.items()}}
    others, absent = _others(case, settings, say)
    entries = (
        *(Entry(variant, path, _feeds(case, variant)) for variant, path in files.items()),
        *(Entry(name, path, _feeds(case, name), OTHERS_MARGIN) for name, path in others.items()),
    )
    absent |= _impossible(case)
    found: list[Row] = []
    for runtime in runtimes(case, settings):
        try:
            interpreter = envs.python(runtime, settings.python)
            contest = Contest(case.format, interpreter, entries, settings.threads)
            outcome = hold(contest, settings.effort, functools.partial(_tell, say, f"{case}, {runtime}"))
        except (FileNotFoundError, WorkerError) as err:
            found += [_absent(case, settings, runtime, entry.name, str(err)) for entry in entries]
        else:
            found += list(outcome_rows(case, settings, runtime, outcome, structures))
        found += [_absent(case, settings, runtime, v, why) for v, why in absent.items()]
    return found


def runtimes(case: Case, settings: Settings) -> tuple[str, ...]:
    """The runtimes that a case is measured on: the newest, and the older one for one case of a network in full."""
    plain = case.full and case.precision == "float32" and case.batch == settings.batches[0]
    return RUNTIMES[case.format] if plain else RUNTIMES[case.format][:1]


def _others(case: Case, settings: Settings, say: Say) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of other converters, and why there are none; they have one image, so the case must have one too."""
    found: dict[str, Path] = {}
    absent: dict[str, str] = {}
    wanted = [c for c in settings.converters if OTHERS[c] == case.format]
    for name in wanted if case.full and case.precision == "float32" and case.batch == 1 else ():
        say(f"{case}: {name} converts")
        try:
            found[name] = case.subject.other(name, envs.python(name, settings.python))
        except (FileNotFoundError, RuntimeError) as err:
            absent[name] = str(err)
    return found, absent


def _tell(say: Say, what: str, text: str) -> None:
    say(f"{what}: {text}")


def _feeds(case: Case, variant: str) -> Path:
    """The images of a case, with the adapters where they are inputs."""
    rich = variant == INPUTS
    path = case.subject.folder / f"feeds-{case.batch}{'-inputs' if rich else ''}.npz"
    if not path.exists():
        shape = (case.batch, *case.subject.network.spec.shape)
        images = np.random.default_rng(case.batch).standard_normal(shape, dtype=np.float32)
        np.savez(path, input=images, **(case.subject.fed if rich else {}))  # type: ignore[arg-type]
    return path


def _impossible(case: Case) -> dict[str, str]:
    return NOT_IN_TFLITE if case.format == "tflite" and case.full else {}


def in_words(report: DropinReport) -> str:
    """A drop-in report in a line: what failed, or how many checks passed."""
    passed = sum(check.verdict == "pass" for check in report.checks)
    failed = [f"{check.name}: {check.detail}" for check in report.checks if check.verdict == "fail"]
    return f"not a drop-in: {'; '.join(failed)}" if failed else f"drop-in: {passed} checks"


def _settings(case: Case, settings: Settings) -> dict[str, str | int | float]:
    size = case.subject.network.size
    return {"batch": case.batch, "precision": case.precision, "threads": settings.threads, "size": size}


def _row(case: Case, settings: Settings, runtime: str, variant: str, quantity: str, **fields: Any) -> Row:
    base = ("latency", case.subject.network.name, case.format, runtime, variant, quantity)
    return Row(*base, unit="s", settings=_settings(case, settings), **fields)


def _absent(case: Case, settings: Settings, runtime: str, variant: str, why: str) -> Row:
    return _row(case, settings, runtime, variant, "latency", figure=None, note=why)


def must(case: Case, variant: str) -> str:
    """The verdict that a variant has to have; empty if any will do.

    Constants beside a weight are folded when a file in float32 is opened, not behind what fp16 and int8 put between.
    """
    return "same" if variant == UNMERGED and case.precision == "float32" else MUST.get(variant, "")


def outcome_rows(
    case: Case, settings: Settings, runtime: str, outcome: Outcome, structures: Mapping[str, str]
) -> Iterable[Row]:
    """Three rows for each file: latency, loading, first run; one for each that was refused."""
    for variant, why in outcome.refused.items():
        yield _absent(case, settings, runtime, variant, why)
    for variant, timing in outcome.timings.items():
        details: dict[str, Any] = {
            "minimum": timing.minimum,
            "ninetieth": timing.ninetieth,
            "runs": timing.runs,
            "structure": structures.get(variant, ""),
            "must": must(case, variant),
            "load average": outcome.load,
            "stolen": outcome.stolen,
            "samples": list(timing.samples),
        }
        test = outcome.against.get(variant)
        fields: dict[str, Any] = {"figure": timing.median, "details": details}
        if test is not None:
            interval = {"low": test.low, "high": test.high, "bootstrap": list(test.bootstrap)}
            details |= {**interval, "processes": test.observations, "margin": test.margin}
            fields |= {"ratio": test.ratio, "reference": BASE, "verdict": test.verdict}
        else:
            details |= {"copies": dataclasses.asdict(outcome.control), "processes": outcome.processes}
        yield _row(case, settings, runtime, variant, "latency", **fields)
        yield _row(case, settings, runtime, variant, "load", figure=timing.load)
        yield _row(case, settings, runtime, variant, "first run", figure=timing.first)


def problems(found: Iterable[Row]) -> list[str]:
    """What came out otherwise than it must: a reason not to trust a run, or a fused file that is not as fast."""
    said = []
    for row in found:
        wanted = row.details.get("must", "")
        if row.benchmark != "latency" or row.quantity not in JUDGED or not wanted or row.ratio is None:
            continue
        wrong = row.verdict not in (wanted, "too noisy") or (wanted == "different" and row.ratio < 1)
        structure = str(row.details.get("structure", ""))
        where = f"{row.model} {row.format} {row.settings.get('precision')} on {row.runtime}: {row.variant}"
        if wrong:
            said.append(f"{where} must be {wanted} and is {row.verdict} at {row.ratio:.3f}")
        if structure.startswith("drop-in") != (row.variant == FUSED):
            said.append(f"{where}: its structure says {structure}")
    return said


def main(argv: list[str]) -> int:
    """Measure, print, write JSON. Exit status 1 if something came out otherwise than it must."""
    p = argparse.ArgumentParser(prog="python -m benchmarks latency", description=__doc__)
    p.add_argument("--full", nargs="*", default=FULL, metavar="NAME:PIXELS[:BATCH,...]", help="in full")
    p.add_argument("--others", nargs="*", default=MORE, metavar="NAME:PIXELS", help="the others")
    p.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="of networks that name none (default: 1 8)")
    p.add_argument("--precision", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="default: all")
    p.add_argument(
        "--converters",
        nargs="*",
        choices=tuple(OTHERS),
        default=Settings.converters,
        help="default: all but onnx2tf, which takes minutes",
    )
    p.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    common_options(p, "latency")
    args = p.parse_args(argv)
    if min(args.batch) < 1 or not 1 <= args.threads <= (os.cpu_count() or 1):
        p.error(f"--batch counts from 1, --threads from 1 to {os.cpu_count()}")
    try:
        for text in (*args.full, *args.others):
            sized(text)
    except ValueError as err:
        p.error(str(err))
    settings = Settings(
        tuple(args.full),
        tuple(args.others),
        tuple(args.batch),
        tuple(args.precision),
        args.threads,
        tuple(args.converters),
        python=args.python,
    )
    if args.quick:
        settings = Settings.smallest(args.python)
    measure = functools.partial(rows, settings)
    return finish("latency", argv, args, measure, problems=problems, quantities=JUDGED)
