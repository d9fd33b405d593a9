"""What does it take to make the files that a device is given: seconds, memory, bytes? And do they answer alike?

Our canonical ONNX file, whole artifacts with either engine, and .tflite files, beside litert-torch, onnx2tf, ExecuTorch
(.pte with XNNPACK) and onnxsim. Every conversion is a fresh process; rounds go through all of them in an order that
varies, but onnx2tf, which takes minutes, runs once and for the first network alone. What is counted begins with the
network in memory (onnx2tf and onnxsim: with an ONNX file) and ends with the file on disk; imports before it are not
counted, those that a converter puts off are. Memory is the peak of the whole process. Answers are compared on one
random image with those of our canonical ONNX file, and these with PyTorch's. Fusing: see `benchmarks.fusing`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import interpreters as envs
from benchmarks.command import Say, common_options, finish
from benchmarks.converting import converted
from benchmarks.export_compare import compared
from benchmarks.export_conversions import ARTIFACT, CANONICAL, CONVERSIONS, Conversion, Made, write_sources
from benchmarks.export_rows import conversion_rows, fusing_rows
from benchmarks.networks import network, parsed
from benchmarks.rows import Row
from benchmarks.step_rounds import orders

MODELS = ("mobilenet_v2:128", "resnet18:128")  # the first one takes the slow converters a minute, the other three


@dataclasses.dataclass(frozen=True)
class Settings:
    """``models`` as NAME:PIXELS; ``rounds`` of conversions; ``fusings`` are the rounds of fusing."""

    models: tuple[str, ...] = MODELS
    rounds: int = 2
    fusings: int = 20
    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: a small network, conversions that take seconds, once."""
        return cls(("resnet20:32",), rounds=1, fusings=3, quick=True, python=python)


def rows(settings: Settings, say: Say) -> list[Row]:
    """All rows of all models."""
    found = [model_rows(text, settings, say, first=index == 0) for index, text in enumerate(settings.models)]
    return [row for rows_of_model in found for row in rows_of_model]


def model_rows(text: str, settings: Settings, say: Say, *, first: bool = True) -> list[Row]:
    """All rows of one network, given as NAME:PIXELS; ``first``: slow converters run too."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, net = Path(scratch), network(text)
        say(f"{text}: writing the network")
        write_sources(net, folder)
        made = conversions(folder, settings, say, first=first)
        answers = compared(net, folder, made, settings.python)
        found = [row for c in CONVERSIONS for row in conversion_rows(c, net, folder, made, answers[c.name])]
        say(f"{text}: fusing")
        return found + fusing_rows(net, ARTIFACT["onnxruntime"].target(folder), folder, settings.fusings)


def conversions(folder: Path, settings: Settings, say: Say, *, first: bool = True) -> dict[str, Made]:
    """Convert, round by round. Our canonical file comes first: another one starts from it."""
    made = {c.name: Made(reason=absent(c, settings, first=first)) for c in CONVERSIONS}
    by_name = {c.name: c for c in CONVERSIONS}
    rest = [name for name in by_name if name != CANONICAL.name]
    for index, order in enumerate(orders(rest, settings.rounds)):
        for name in [CANONICAL.name, *order]:
            if made[name].reason or (by_name[name].once and index):
                continue
            say(f"round {index + 1} of {settings.rounds}: {name}")
            _convert(by_name[name], folder, settings, made[name])
    return made


def absent(conversion: Conversion, settings: Settings, *, first: bool = True) -> str:
    """Why a conversion does not run; empty if it does."""
    if conversion.once and not first:
        return f"left out: takes minutes, so it runs for the first network, {settings.models[0]}"
    if settings.quick and not conversion.seconds:
        return "left out: --quick makes what takes seconds"
    try:
        envs.python(conversion.environment, settings.python)
    except FileNotFoundError as err:
        return str(err)
    return ""


def _convert(conversion: Conversion, folder: Path, settings: Settings, made: Made) -> None:
    interpreter = envs.python(conversion.environment, settings.python)
    source, target = folder / conversion.file, conversion.target(folder)
    try:
        made.said.append(converted(interpreter, conversion.worker, conversion.name, source, target))
    except RuntimeError as err:
        made.reason = f"fails: {err}"


def main(argv: Sequence[str]) -> int:
    """Measure, print, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks export", description=__doc__)
    p.add_argument("--models", nargs="+", default=MODELS, metavar="NAME:PIXELS", help=f"default: {' '.join(MODELS)}")
    p.add_argument("--rounds", type=int, default=Settings.rounds, help="of conversions (default: %(default)s)")
    common_options(p, "export")
    args = p.parse_args(argv)
    try:
        for text in args.models:
            parsed(text)
    except ValueError as err:
        p.error(str(err))
    if args.rounds < 1:
        p.error(f"--rounds counts from 1, got {args.rounds}")
    settings = Settings(tuple(args.models), args.rounds, python=args.python)
    return finish(
        "export", argv, args, functools.partial(rows, Settings.smallest(args.python) if args.quick else settings)
    )
