"""Interleaved rounds, and what they say: every competitor has a turn in every round, in an order that varies."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

Turn = Callable[[], Sequence[float]]  # seconds of each step of a turn
LOSS_TOLERANCE = 1e-4  # relative; the same network and batch in float32


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds of one competitor: the least, the median, the 90th percentile, and how many steps these come from."""

    minimum: float
    median: float
    ninetieth: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How long one takes as a multiple of another: of their minima, their medians, and round by round (median)."""

    minima: float
    medians: float
    paired: float


def orders(names: Sequence[str], rounds: int, *, seed: int = 0) -> Iterator[list[str]]:
    """The order of each round: rotated, so that each name is first equally often, and shuffled behind the first.

    >>> [order[0] for order in orders(["a", "b", "c"], 4)]
    ['a', 'b', 'c', 'a']
    """
    rng = random.Random(seed)
    for index in range(rounds):
        first = names[index % len(names)]
        rest = [name for name in names if name != first]
        yield [first, *rng.sample(rest, len(rest))]


def interleaved(turns: Mapping[str, Turn], rounds: int, *, seed: int = 0) -> dict[str, list[list[float]]]:
    """Seconds by name, round and step."""
    found: dict[str, list[list[float]]] = {name: [] for name in turns}
    for order in orders(list(turns), rounds, seed=seed):
        for name in order:
            found[name].append(list(turns[name]()))
    return found


def summary(rounds: Sequence[Sequence[float]]) -> Summary:
    """Of all steps of all rounds.

    >>> summary([[3.0, 1.0], [2.0, 5.0]])
    Summary(minimum=1.0, median=2.5, ninetieth=5.0, steps=4)
    """
    steps = sorted(second for turn in rounds for second in turn)
    ninetieth = steps[math.ceil(0.9 * len(steps)) - 1]
    return Summary(steps[0], statistics.median(steps), ninetieth, len(steps))


def ratio(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """``one`` as a multiple of ``other``, measured in the same rounds.

    >>> ratio([[2.0, 4.0], [6.0]], [[1.0, 1.0], [2.0]])
    Ratio(minima=2.0, medians=4.0, paired=3.0)

    Raises ValueError if the rounds are not the same ones.
    """
    a, b = summary(one), summary(other)
    pairs = [statistics.median(x) / statistics.median(y) for x, y in zip(one, other, strict=True)]
    return Ratio(a.minimum / b.minimum, a.median / b.median, statistics.median(pairs))


def disagreeing(losses: Mapping[str, float], reference: str) -> list[str]:
    """Names whose first loss is not that of ``reference``: they do not step the same network on the same batch.

    >>> disagreeing({"a": 2.0, "b": 2.00001, "c": 2.1}, "a")
    ['c']
    """
    wanted = losses[reference]
    return [n for n, loss in losses.items() if not math.isclose(loss, wanted, rel_tol=LOSS_TOLERANCE)]
