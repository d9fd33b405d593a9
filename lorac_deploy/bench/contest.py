"""Which of several model files is faster? Interleaved runs in fresh processes, the first file being the reference.

Where a file's weights lie in memory makes it some 1 % faster or slower for the life of a process. So every file is
opened twice in each process, in an order that mirrors itself (A B B A), and a process is one observation: the mean over
both copies of the logarithm of a file's least time, less the same of the reference. (The least: other work on a machine
adds to a run, it never takes from it.) Runs come in turns, again mirrored from round to round; the first of a turn is
not counted. Loading and first runs are reported apart.

Processes are added until every file is judged, or there are ``most``: then what is left is "too noisy". A file that is
judged leaves, and after the second look one of which hardly a verdict is to be expected. As the question is asked at
each of the ``looks``, each look is stricter by that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorac_deploy.bench.environment import ticks, usable_cores
from lorac_deploy.bench.equivalence import MARGIN, Equivalence, equivalence, hopeless
from lorac_deploy.bench.processes import Worker, WorkerError

WORKER = Path(__file__).with_name("worker.py")
COPIES = 2  # of each file in a process
SAMPLES = 400  # single times kept of a file, spread over all
Say = Callable[[str], None]
Rounds = dict[str, list[list[float]]]  # by copy: seconds of each turn's runs


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model file, and an .npz file with an array for each of its inputs. ``margin``: what counts as the same."""

    name: str
    path: Path
    feeds: Path
    margin: float = MARGIN


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured: ``looks`` are numbers of processes after which it is judged.

    Each process warms up for ``warm`` seconds and measures for ``seconds``, in turns of ``turn`` seconds, but goes
    through all files ``fewest`` times at least.
    """

    looks: tuple[int, ...] = (4, 8, 16)
    seconds: float = 2.0
    fewest: int = 6
    turn: float = 0.02
    warm: float = 0.5

    @property
    def most(self) -> int:
        """Processes at most."""
        return self.looks[-1]

    @classmethod
    def up_to(cls, processes: int) -> Effort:
        """As by default, with so many processes at most.

        >>> Effort.up_to(8).looks, Effort.up_to(40).looks
        ((4, 8), (4, 8, 16, 40))
        """
        usual = cls().looks
        return cls(looks=tuple(sorted({look for look in usual if look < processes} | {processes})))


QUICK = Effort(looks=(3,), seconds=0.5, fewest=4, turn=0.01, warm=0.3)


@dataclasses.dataclass(frozen=True)
class Contest:
    """Files of one format, run by one interpreter's runtime; the first is the reference of all others."""

    format: str
    interpreter: Path
    entries: tuple[Entry, ...]
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one file over the processes up to the first look, in which all files ran: only those compare.

    ``load`` and ``first`` are medians over all processes.
    """

    minimum: float
    median: float
    ninetieth: float
    runs: int
    load: float
    first: float
    samples: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a contest found. ``control`` compares the reference's own two copies.

    ``refused`` holds files that could not be run, with the reason. ``stolen`` is the share of time that other guests of
    the machine's host took, ``load`` the system's load before.
    """

    timings: Mapping[str, Timing]
    against: Mapping[str, Equivalence]
    control: Equivalence
    refused: Mapping[str, str]
    runtime: Mapping[str, Any]
    processes: int
    load: float
    stolen: float


@dataclasses.dataclass
class _Observed:
    """What the processes so far have said."""

    opened: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    rounds: list[Rounds] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    judged: dict[str, Equivalence] = dataclasses.field(default_factory=dict)
    given_up: set[str] = dataclasses.field(default_factory=set)
    runtime: dict[str, Any] = dataclasses.field(default_factory=dict)


def hold(contest: Contest, effort: Effort, say: Say = lambda _: None) -> Outcome:
    """Measure all files of a contest.

    Raises WorkerError if the runtime cannot be started, or cannot run the reference.
    """
    seen, load, before = _Observed(), os.getloadavg()[0], ticks()
    for index, look in enumerate(effort.looks):
        while len(seen.rounds) < look:
            say(f"process {len(seen.rounds) + 1} of at most {effort.most}")
            _one_process(contest, effort, seen)
        for entry in _open_questions(contest, seen):
            ratios = _ratios(contest, seen, entry)
            seen.judged[entry.name] = equivalence(ratios, looks=len(effort.looks), margin=entry.margin)
            if index > 0 and look < effort.most:  # a first look says too little of the spread
                _give_up(effort, seen, entry, ratios)
        if not _open_questions(contest, seen):
            break
    reference = contest.entries[0].name
    stolen, passed = (now - then for now, then in zip(ticks(), before, strict=True))
    return Outcome(
        timings={name: _timing(seen, name, effort.looks[0]) for name in (reference, *seen.judged)},
        against=seen.judged,
        control=equivalence([math.exp(_copy(rounds, reference)) for rounds in seen.rounds]),
        refused=seen.refused,
        runtime=seen.runtime,
        processes=len(seen.rounds),
        load=load,
        stolen=stolen / passed if passed else 0.0,
    )


def _open_questions(contest: Contest, seen: _Observed) -> list[Entry]:
    """Files that are still to be judged: those that are go no further, which leaves time for the others."""
    return [
        entry
        for entry in contest.entries[1:]
        if entry.name not in seen.refused
        and entry.name not in seen.given_up
        and (entry.name not in seen.judged or seen.judged[entry.name].verdict == "too noisy")
    ]


def _one_process(contest: Contest, effort: Effort, seen: _Observed) -> None:
    """Add what one fresh process observes."""
    with Worker(command(contest)) as worker:
        seen.runtime = worker.ask("hello")
        order = _opened(worker, contest, seen)
        warm = worker.ask("warm", names=order, seconds=effort.warm / len(order))
        typical = [statistics.median(warm[name][-3:]) for name in order]
        counts = [max(1, round(effort.turn / run)) for run in typical]
        cost = sum((count + 1) * run for count, run in zip(counts, typical, strict=True))
        rounds: Rounds = {name: [] for name in order}
        for index in range(max(effort.fewest, int(effort.seconds / cost))):
            step = 1 if index % 2 == 0 else -1
            names = order[::step]
            for name, seconds in zip(names, worker.ask("turns", names=names, counts=counts[::step])["seconds"]):  # noqa: B905
                rounds[name].append(seconds)
        seen.rounds.append(rounds)


def _opened(worker: Worker, contest: Contest, seen: _Observed) -> list[str]:
    """Open every file twice, the second time in the mirrored order; files that fail are left out from now on."""
    names = [entry.name for entry in (contest.entries[0], *_open_questions(contest, seen))]
    turn = len(seen.rounds) % len(names)
    once = [*names[turn:], *names[:turn]]
    files = {entry.name: entry for entry in contest.entries}
    opened = []
    for number, name in [(0, n) for n in once] + [(1, n) for n in once[::-1]]:
        try:
            figures = worker.ask("open", name=copy_name(name, number), **_file(files[name]))
        except WorkerError as err:
            if name == contest.entries[0].name:
                raise
            seen.refused[name] = str(err)
        else:
            seen.opened.setdefault(name, []).append(figures)
            opened.append(copy_name(name, number))
    return [copy for copy in opened if copy.rpartition("#")[0] not in seen.refused]


def _file(entry: Entry) -> dict[str, str]:
    return {"path": str(entry.path.resolve()), "feeds": str(entry.feeds.resolve())}


def command(contest: Contest) -> list[str]:
    """What starts a worker: isolated, so that no package of ours or of the user's shadows the runtime's."""
    cores = usable_cores()[-contest.threads :] or None  # the last ones: interrupts tend to go to the first
    job = {"format": contest.format, "threads": contest.threads, "cores": cores}
    return [str(contest.interpreter), "-I", str(WORKER), json.dumps(job)]


def copy_name(name: str, number: int) -> str:
    """How a worker calls a copy of a file.

    >>> copy_name("base", 1)
    'base#1'
    """
    return f"{name}#{number}"


def _give_up(effort: Effort, seen: _Observed, entry: Entry, ratios: Sequence[float]) -> None:
    """Measure a file no further if more processes would not tell either."""
    if hopeless(ratios, effort.most, margin=entry.margin, looks=len(effort.looks)):
        seen.given_up.add(entry.name)


def _ratios(contest: Contest, seen: _Observed, entry: Entry) -> list[float]:
    """A file's time as a multiple of the reference's, in each process so far in which both ran."""
    reference = contest.entries[0].name
    both = [rounds for rounds in seen.rounds if copy_name(entry.name, 0) in rounds]
    return [math.exp(_file_to_file(rounds, reference, entry.name)) for rounds in both]


def _file_to_file(rounds: Rounds, reference: str, name: str) -> float:
    """The logarithm of one process's ratio: copies of ``name`` against copies of ``reference``."""
    return statistics.fmean(
        _level(rounds[copy_name(name, number)]) - _level(rounds[copy_name(reference, number)])
        for number in range(COPIES)
    )


def _copy(rounds: Rounds, name: str) -> float:
    """The logarithm of one process's ratio of a file's second copy to its first."""
    return _level(rounds[copy_name(name, 1)]) - _level(rounds[copy_name(name, 0)])


def _level(turns: Sequence[Sequence[float]]) -> float:
    return math.log(min(second for turn in turns for second in turn))


def _timing(seen: _Observed, name: str, processes: int) -> Timing:
    copies = [copy_name(name, number) for number in range(COPIES)]
    single = [s for rounds in seen.rounds[:processes] for copy in copies for turn in rounds.get(copy, ()) for s in turn]
    ordered = sorted(single)
    opened = seen.opened[name]
    return Timing(
        minimum=ordered[0],
        median=statistics.median(ordered),
        ninetieth=ordered[math.ceil(0.9 * len(ordered)) - 1],
        runs=len(ordered),
        load=statistics.median(figures["load"] for figures in opened),
        first=statistics.median(figures["first"] for figures in opened),
        samples=tuple(single[:: max(1, len(single) // SAMPLES)]),
    )
