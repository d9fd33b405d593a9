"""Latency of base.tflite, fused.tflite and other converters' files, on tflite-runtime and on ai-edge-litert.

Every file of a network runs in one process, in interleaved rounds. Where its weights lie in memory makes a file some
1 % faster or slower for the life of a process, and it depends on the order of opening: so processes come in pairs that
open the files in opposite orders, and a pair is one observation. Its ratio is the mean of both processes' median ratio
of least times: other work on the machine adds to a run, it never takes from it. The verdict is an equivalence test over
the pairs (+-1 % for fused against base, +-3 % for other converters). Not counted: load time, first runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import interpreters as envs
from benchmarks.step_process import Worker
from benchmarks.step_protocol import Job
from benchmarks.step_rounds import interleaved, summary
from benchmarks.tflite_files import Network, network, other_file, our_files
from lorac_deploy.bench.environment import environment
from lorac_deploy.bench.equivalence import Equivalence, equivalence

RUNTIMES = {"tflite-runtime": envs.TFLITE_RUNTIME, "ai-edge-litert": envs.LITERT}
CONVERTERS = {"litert-torch": envs.LITERT_TORCH, "onnx2tf": envs.ONNX2TF}
MARGINS = {"fused": 0.01, "litert-torch": 0.03, "onnx2tf": 0.03}
RUNS, WARMUP = 10, 20
AGREEMENT = 1e-4  # of answers, relative to the largest
Rounds = dict[str, list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One file on one runtime: seconds of a run, and how it compares with base.tflite."""

    model: str
    runtime: str
    threads: int
    file: str
    minimum: float
    median: float
    against_base: Equivalence | None


def measure(files: dict[str, Path], job: Job, interpreter: Path, pairs: int, rounds: int) -> list[Rounds]:
    """Seconds by file, round and run, for each process; processes 2 i and 2 i + 1 are a pair."""
    found = []
    for index in range(2 * pairs):
        options = {"files": {name: str(files[name]) for name in opening_order(list(files), index)}}
        with Worker(interpreter, "benchmarks.tflite_worker", dataclasses.replace(job, options=options)) as worker:
            turns = {name: functools.partial(_run, worker, name, RUNS) for name in files}
            for name in files:
                _run(worker, name, WARMUP)
            found.append(interleaved(turns, rounds, seed=index))
    return found


def opening_order(names: list[str], index: int) -> list[str]:
    """The order in which process ``index`` opens its files: rotated from pair to pair, reversed within a pair.

    >>> [opening_order(["a", "b", "c"], i) for i in range(4)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a'], ['a', 'c', 'b']]
    """
    turn = index // 2 % len(names)
    order = [*names[turn:], *names[:turn]]
    return order[::-1] if index % 2 else order


def _run(worker: Worker, name: str, count: int) -> list[float]:
    seconds: list[float] = worker.ask("run", file=name, count=count)["seconds"]
    return seconds


def described(job: Job, interpreter: Path) -> dict[str, Any]:
    """What a runtime's worker runs on."""
    with Worker(interpreter, "benchmarks.tflite_worker", dataclasses.replace(job, options={"files": {}})) as worker:
        found: dict[str, Any] = worker.ask("hello")["environment"]
    return found


def disagreeing(files: dict[str, Path], job: Job, interpreter: Path) -> list[str]:
    """Files that do not compute what base.tflite does; fused.tflite computes something else on purpose."""
    options = {"files": {name: str(path) for name, path in files.items() if name != "fused"}}
    with Worker(interpreter, "benchmarks.tflite_worker", dataclasses.replace(job, options=options)) as worker:
        outputs = {name: np.asarray(worker.ask("answer", file=name)["output"]) for name in options["files"]}
    base = outputs["base"]
    bound = AGREEMENT * max(1.0, float(np.abs(base).max()))
    return [name for name, found in outputs.items() if np.abs(found - base).max() > bound]


def compared(processes: list[Rounds], model: str, runtime: str, threads: int) -> list[Row]:
    """A row for each file."""
    rows = []
    for name in processes[0]:
        test = None if name == "base" else equivalence(pair_ratios(processes, name), margin=MARGINS[name])
        total = summary([turn for rounds in processes for turn in rounds[name]])
        rows.append(Row(model, runtime, threads, name, total.minimum, total.median, test))
    return rows


def pair_ratios(processes: list[Rounds], name: str) -> list[float]:
    """A file's time as a multiple of base's, for each pair of processes.

    >>> one, other = {"base": [[1.0]], "a": [[4.0, 9.0]]}, {"base": [[2.0, 3.0]], "a": [[2.0]]}
    >>> pair_ratios([one, other], "a")
    [2.0]
    """
    ratios = [
        statistics.median(min(a) / min(b) for a, b in zip(rounds[name], rounds["base"], strict=True))
        for rounds in processes
    ]
    return [statistics.geometric_mean(pair) for pair in zip(ratios[::2], ratios[1::2], strict=True)]


def files_of(net: Network, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Any]]:
    """Every file of a network that could be made, and what making each took, or why it failed."""
    files, seconds = our_files(net, folder)
    made: dict[str, Any] = {"ours": seconds}
    for name in args.converters:
        try:
            files[name], made[name] = other_file(net, name, envs.python(CONVERTERS[name], args.python), folder)
        except (FileNotFoundError, RuntimeError) as err:
            made[name] = {"error": str(err)}
            print(f"{net.name}: {name} left out: {err}", flush=True)
    return files, made


def measure_network(text: str, args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one network, given as NAME:PIXELS."""
    name, _, size = text.partition(":")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, net = Path(scratch), network(name, int(size or 32))
        files, made = files_of(net, folder, args)
        images = np.random.default_rng(0).standard_normal((args.batch, *net.shape[1:], 3), dtype=np.float32)
        np.savez(folder / "batch.npz", images=images, labels=np.zeros(args.batch, np.int64))
        for runtime, env in RUNTIMES.items():
            interpreter = envs.python(env, args.python)
            made[runtime] = described(Job("", str(folder / "batch.npz"), 1, {}), interpreter)
            for threads in args.threads:
                job = Job("", str(folder / "batch.npz"), threads, {})
                if wrong := disagreeing(files, job, interpreter):
                    raise RuntimeError(f"{text} on {runtime}: {', '.join(wrong)} computes something else than base")
                processes = measure(files, job, interpreter, args.pairs, args.rounds)
                rows += compared(processes, text, runtime, threads)
                show(rows[-len(files) :])
    return rows, made


def show(rows: Sequence[Row]) -> None:
    """Print rows as they come."""
    for row in rows:
        test = row.against_base
        verdict = "" if test is None else f"{test.ratio:7.4f} [{test.low:.4f}, {test.high:.4f}] {test.verdict}"
        times = f"{1e3 * row.minimum:8.3f} {1e3 * row.median:8.3f} ms"
        print(f"{row.model:20} {row.runtime:15} {row.threads} {row.file:13} {times} {verdict}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks tflite", description=__doc__)
    p.add_argument("--models", nargs="+", default=["resnet18:32"], metavar="NAME:PIXELS", help="default: resnet18:32")
    p.add_argument("--batch", type=int, default=1, help="images in a run (default: 1)")
    p.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    p.add_argument("--pairs", type=int, default=6, help="pairs of processes for each runtime (default: 6)")
    p.add_argument("--rounds", type=int, default=10, help=f"rounds of {RUNS} runs in a process (default: 10)")
    p.add_argument("--converters", nargs="*", choices=tuple(CONVERTERS), default=list(CONVERTERS), help="default: all")
    p.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of an environment")
    p.add_argument("--out", type=Path, help="write the rows as JSON")
    return p


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    args = parser().parse_args(argv)
    args.python = envs.parsed_interpreters(args.python)
    rows, made = [], {}
    for text in args.models:
        found, made[text] = measure_network(text, args)
        rows += found
    print(json.dumps(made, indent=1))
    if args.out:
        content = {"environment": environment(), "made": made, "rows": [dataclasses.asdict(row) for row in rows]}
        args.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0
