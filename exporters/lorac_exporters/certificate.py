"""Do several files of one network answer alike? Each pair of them is compared on real images.

A model is a function from raw images, uint8 (n, height, width, channels), or signals, float32 (n, ...), to its outputs
by name; what it is made of (PyTorch, ONNX, TFLite) is not known here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Images = npt.NDArray[Any]
Answers = Callable[[Images], Mapping[str, Array]]  # each output (n, ...)
Verdict = Literal["pass", "inaccurate", "fail"]

# How nearly a file must answer, by how it stores its weights. float32: another order of additions, some 1e-6; the
# artifact says how much. fp16: every weight is off by up to 2**-11 of itself. int8: logits are off by some of 255
# steps, so it is the classes named that decide.
RELATIVE = {"fp16": 5e-3, "int8": 0.25}
AGREEMENT = {"float32": 0.999, "fp16": 0.99, "int8": 0.95}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """``relative``: the most that numbers may differ, in units of max(1, largest number of the reference).

    ``agreement``: the least share of images on which both name the same class first.

    Raises ValueError for a value out of range.
    """

    relative: float
    agreement: float

    def __post_init__(self) -> None:
        if not (self.relative >= 0 and math.isfinite(self.relative)):
            raise ValueError(f"a tolerance must be 0 or more, got {self.relative}")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"an agreement is a share between 0 and 1, got {self.agreement}")

    @classmethod
    def of(cls, weights: Iterable[str], exact: float) -> Tolerance:
        """The default for files that store their ``weights`` in these ways; ``exact`` is the one for float32.

        >>> Tolerance.of(("float32", "fp16"), 1e-4)
        Tolerance(relative=0.005, agreement=0.99)
        """
        coarsest = max(weights, key=list(AGREEMENT).index)
        return cls(RELATIVE.get(coarsest, exact), AGREEMENT[coarsest])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models, by name, that should answer alike, and how nearly."""

    reference: str
    candidate: str
    tolerance: Tolerance


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """How one output of a pair agrees.

    ``max_abs`` is the largest difference, ``max_rel`` that in units of max(1, largest number of the reference),
    ``agreement`` the share of images with the same class first. All are None where nothing could be compared, and
    ``problem`` says why.
    """

    output: str
    max_abs: float | None
    max_rel: float | None
    agreement: float | None
    problem: str = ""

    def verdict(self, tolerance: Tolerance) -> Verdict:
        """``fail``: other answers; ``inaccurate``: the same answers, with numbers further off than allowed."""
        if self.problem or self.max_rel is None or self.agreement is None or self.agreement < tolerance.agreement:
            return "fail"
        return "pass" if self.max_rel <= tolerance.relative else "inaccurate"


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What `compare` found of one pair."""

    pair: Pair
    outputs: tuple[OutputReport, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all outputs; without any, nothing was compared: ``fail``."""
        found = {output.verdict(self.pair.tolerance) for output in self.outputs}
        return "fail" if "fail" in found or not found else "inaccurate" if "inaccurate" in found else "pass"


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All pairs on ``images`` images; ``accuracies`` by model and output where labels were given."""

    images: int
    pairs: tuple[PairReport, ...]
    accuracies: dict[str, dict[str, float]]

    @property
    def ok(self) -> bool:
        """Whether there was something to compare and every pair passed."""
        return bool(self.pairs) and self.images > 0 and all(pair.verdict == "pass" for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, no NaN."""
        pairs = [dataclasses.asdict(p.pair) | {"verdict": p.verdict, "outputs": _rows(p)} for p in self.pairs]
        return {"ok": self.ok, "images": self.images, "pairs": pairs, "accuracies": self.accuracies}


def compare(
    models: Mapping[str, Answers],
    pairs: Sequence[Pair],
    batches: Iterable[tuple[Images, npt.NDArray[np.int64] | None]],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Certificate:
    """Run every model that a pair names on all batches (images, labels or None) and compare.

    ``on_batch`` hears how many images are done. Nothing is kept of a batch but sums and maxima.

    >>> def exact(images: Images) -> dict[str, Array]:
    ...     return {"logits": images.reshape(len(images), -1).astype(np.float32)}
    >>> images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    >>> pair = Pair("a", "b", Tolerance(1e-5, 1.0))
    >>> compare({"a": exact, "b": exact}, [pair], [(images, None)]).ok
    True

    Raises ValueError if a pair names a model that is not among ``models``, or itself.
    """
    _check_pairs(models, pairs)
    used = {name: models[name] for pair in pairs for name in (pair.reference, pair.candidate)}
    tallies: dict[Pair, dict[str, _Tally]] = {pair: {} for pair in pairs}
    right: dict[str, dict[str, int]] = {}
    images = 0
    for batch, labels in batches:
        answers = {name: model(batch) for name, model in used.items()}
        images += len(batch)
        for pair, found in tallies.items():
            _add(found, answers[pair.reference], answers[pair.candidate], len(batch))
        if labels is not None:
            _count_right(right, answers, labels)
        if on_batch is not None:
            on_batch(images)
    reports = tuple(PairReport(pair, tuple(_closed(name, t) for name, t in tallies[pair].items())) for pair in pairs)
    shares = {model: {name: n / images for name, n in counts.items()} for model, counts in right.items()}
    return Certificate(images, reports, shares)


def spread(total: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` of ``total`` images, evenly spaced, since data are often sorted by class; 0: all.

    >>> spread(10, 4).tolist(), spread(3, 0).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    count = min(count or total, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


@dataclasses.dataclass
class _Tally:
    """Of one output of one pair, over all batches so far."""

    images: int = 0
    equal: int = 0
    max_abs: float = 0.0
    largest: float = 0.0
    problem: str = ""

    def add(self, expected: Array, got: Array) -> None:
        """One batch of both."""
        self.problem = self.problem or _problem(expected, got)
        if self.problem:
            return
        self.images += len(expected)
        self.equal += int(np.sum(_first(expected) == _first(got)))
        self.max_abs = max(self.max_abs, float(np.max(np.abs(expected.astype(np.float64) - got))))
        self.largest = max(self.largest, float(np.max(np.abs(expected))))


def _add(found: dict[str, _Tally], expected: Mapping[str, Array], got: Mapping[str, Array], images: int) -> None:
    for name in dict.fromkeys((*expected, *got)):
        tally = found.setdefault(name, _Tally())
        if name not in expected or name not in got:
            tally.problem = tally.problem or f"{'reference' if name in got else 'candidate'} has no such output"
        elif len(expected[name]) != images:
            tally.problem = tally.problem or f"{len(expected[name])} answers for {images} images"
        else:
            tally.add(np.asarray(expected[name]), np.asarray(got[name]))


def _problem(expected: Array, got: Array) -> str:
    if expected.shape != got.shape or expected.size == 0:
        return f"shape {got.shape}, expected {expected.shape}"
    for side, values in (("reference", expected), ("candidate", got)):
        wrong = int(np.sum(~np.isfinite(values)))
        if wrong:
            return f"{wrong} of {values.size} numbers of the {side} are not finite"
    return ""


def _first(values: Array) -> Array:
    """The class named first, for each image."""
    return np.asarray(np.argmax(values.reshape(len(values), -1), axis=1))


def _closed(name: str, tally: _Tally) -> OutputReport:
    if tally.problem or tally.images == 0:
        return OutputReport(name, None, None, None, tally.problem or "no images")
    relative = tally.max_abs / max(1.0, tally.largest)
    return OutputReport(name, tally.max_abs, relative, tally.equal / tally.images)


def _count_right(
    right: dict[str, dict[str, int]], answers: Mapping[str, Mapping[str, Array]], labels: npt.NDArray[np.int64]
) -> None:
    for model, outputs in answers.items():
        counts = right.setdefault(model, {})
        for name, values in outputs.items():
            if np.shape(values)[:1] == labels.shape and np.size(values):
                counts[name] = counts.get(name, 0) + int(np.sum(_first(np.asarray(values)) == labels))


def _check_pairs(models: Mapping[str, Answers], pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        unknown = {pair.reference, pair.candidate} - set(models)
        if unknown or pair.reference == pair.candidate:
            raise ValueError(f"{pair.reference} against {pair.candidate}: two of {', '.join(models)} are needed")


def _rows(report: PairReport) -> list[dict[str, Any]]:
    tolerance = report.pair.tolerance
    return [dataclasses.asdict(output) | {"verdict": output.verdict(tolerance)} for output in report.outputs]
