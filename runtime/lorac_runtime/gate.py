"""The gate: is an adapted model better than the one in place, as far as held-out samples can tell?

Both models answer the same samples, so what counts are the samples on which one is right and the other is wrong. A few
good guesses are no proof: the gain counts at the lower end of its confidence interval.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.config import option

Floats = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
ROUNDING = 1e-9  # 0.9 - 0.85 is a little more than 0.05


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What an adapted model has to show. All are shares of samples, 0 to 1.

    It is accepted if, with this ``confidence``, its accuracy on held-out samples is higher by more than ``margin``, if
    the mean of its accuracies by class is higher, if it loses at most ``anchor_loss`` of the accuracy on the anchors,
    and if, with the same confidence, fewer than ``wrong_labels`` of the held-out labels are wrong.

    Raises ValueError for a value out of range.
    """

    margin: float = option(0.0, "accuracy that it has to gain on held-out samples, 0 to 1 (default: %(default)s)")
    confidence: float = option(0.95, "how sure that has to be, 0.5 to 1 (default: %(default)s)")
    anchor_loss: float = option(
        0.05, "accuracy that it may lose on the artifact's anchors, 0 to 1 (default: %(default)s)"
    )
    wrong_labels: float = option(
        0.3, "share of the held-out labels that may be wrong, 0 to 1; 1 asks nothing (default: %(default)s)"
    )

    def __post_init__(self) -> None:
        for name in ("margin", "anchor_loss", "wrong_labels"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, got {getattr(self, name)}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence}")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Logits (samples, classes) of the model ``before`` and ``after``, for samples with ``labels`` (samples,)."""

    before: Floats
    after: Floats
    labels: Labels

    @property
    def right_before(self) -> npt.NDArray[np.bool_]:
        """Which samples the model in place answers rightly."""
        return right(self.before, self.labels)

    @property
    def right_after(self) -> npt.NDArray[np.bool_]:
        """Which samples the adapted model answers rightly."""
        return right(self.after, self.labels)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an adapted model is ``accepted``, else the ``reasons`` why not, and the figures behind it.

    ``before`` and ``after`` are accuracies on the ``held_out`` samples, ``gain`` their difference and ``gain_low`` the
    lower end of its confidence interval; ``by_class_before`` and ``_after`` are means of accuracies by class.
    ``wrong_labels`` estimates the share of held-out labels that are wrong, ``wrong_labels_high`` is the upper end of
    its interval. Those of the ``anchors`` are None where the artifact has none. A run that diverged has no figures.
    """

    accepted: bool
    reasons: tuple[str, ...]
    held_out: int = 0
    before: float | None = None
    after: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    by_class_before: float | None = None
    by_class_after: float | None = None
    wrong_labels: float | None = None
    wrong_labels_high: float | None = None
    anchors_before: float | None = None
    anchors_after: float | None = None


def judged(held_out: Answers, anchors: Answers | None, config: GateConfig) -> Verdict:
    """Whether to accept the adapted model.

    >>> labels = np.arange(40) % 4
    >>> old, new = np.zeros((40, 4)), np.eye(4)[labels]
    >>> judged(Answers(old, new, labels), None, GateConfig()).accepted
    True
    >>> judged(Answers(new, new, labels), None, GateConfig()).reasons[0]
    'accuracy rose by 0.0 points on 40 held-out samples, at least -5.5 with 95% confidence: not more than 0.0'
    """
    gain, low = paired_gain(held_out, config.confidence)
    share, high = wrong_label_share(held_out.after, held_out.labels, config.confidence)
    by_class = by_class_accuracy(held_out.right_before, held_out.labels)
    by_class_after = by_class_accuracy(held_out.right_after, held_out.labels)
    verdict = Verdict(
        accepted=True,
        reasons=(),
        held_out=len(held_out.labels),
        before=_mean(held_out.right_before),
        after=_mean(held_out.right_after),
        gain=gain,
        gain_low=low,
        by_class_before=by_class,
        by_class_after=by_class_after,
        wrong_labels=share,
        wrong_labels_high=high,
        anchors_before=None if anchors is None else _mean(anchors.right_before),
        anchors_after=None if anchors is None else _mean(anchors.right_after),
    )
    reasons = tuple(_reasons(verdict, config))
    return dataclasses.replace(verdict, accepted=not reasons, reasons=reasons)


def _reasons(v: Verdict, config: GateConfig) -> list[str]:
    """Why a model is not accepted, a line each."""
    found, sure = [], f"with {100 * config.confidence:.3g}% confidence"
    if not _number(v.gain_low) > config.margin:
        found.append(
            f"accuracy rose by {_points(v.gain)} points on {v.held_out} held-out samples, at least "
            f"{_points(v.gain_low)} {sure}: not more than {_points(config.margin)}"
        )
    if not _number(v.by_class_after) > _number(v.by_class_before):
        found.append(
            f"the mean of accuracies by class did not rise: {_percent(v.by_class_before)} before, "
            f"{_percent(v.by_class_after)} after"
        )
    if config.wrong_labels < 1 and not _number(v.wrong_labels_high) < config.wrong_labels:
        found.append(
            f"about {_percent(v.wrong_labels)} of the labels look wrong, at most {_percent(v.wrong_labels_high)} "
            f"{sure}: not less than {_percent(config.wrong_labels)}"
        )
    if _number(v.anchors_before) - _number(v.anchors_after) > config.anchor_loss + ROUNDING:
        found.append(
            f"accuracy on the artifact's anchors fell from {_percent(v.anchors_before)} to "
            f"{_percent(v.anchors_after)}: more than {_points(config.anchor_loss)} points"
        )
    return found


def right(logits: Floats, labels: Labels) -> npt.NDArray[np.bool_]:
    """Which samples are answered rightly; where numbers are not finite, none.

    >>> right(np.array([[1.0, 0.0], [0.0, np.nan]]), np.array([0, 1])).tolist()
    [True, False]
    """
    sound = np.asarray(np.isfinite(logits).all(axis=1), np.bool_)
    found: npt.NDArray[np.bool_] = sound & (np.where(sound[:, np.newaxis], logits, 0.0).argmax(axis=1) == labels)
    return found


def paired_gain(answers: Answers, confidence: float) -> tuple[float, float]:
    """(accuracy after minus before, lower end of its one-sided confidence interval), both from -1 to 1.

    The adjusted Wald interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37, eq. 4) for a difference of paired
    proportions, which keeps its promise for small samples too: one answer is added to each kind of disagreement.

    >>> labels = np.zeros(50, np.int64)
    >>> better, worse = np.eye(2)[labels], np.eye(2)[1 - labels]
    >>> [round(value, 3) for value in paired_gain(Answers(worse, better, labels), 0.95)]
    [1.0, 0.899]
    """
    before, after, n = answers.right_before, answers.right_after, len(answers.labels)
    won, lost = np.count_nonzero(after & ~before), np.count_nonzero(before & ~after)
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    error = math.sqrt(max(0.0, p + q - (p - q) ** 2) / (n + 2))
    return float((won - lost) / n), float(p - q - _z(confidence) * error)


def by_class_accuracy(hits: npt.NDArray[np.bool_], labels: Labels) -> float:
    """The mean, over the classes that occur, of the share that is right.

    >>> by_class_accuracy(np.array([True, True, True, False]), np.array([0, 0, 0, 1]))
    0.5
    """
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def wrong_label_share(logits: Floats, labels: Labels, confidence: float) -> tuple[float, float]:
    """(estimated share of wrong labels, upper end of its one-sided confidence interval).

    A model that errs on a hard sample mostly ranks its class second or third. A label that was given at random is as
    likely to be ranked last as second. So labels in the lower half of the ranking (of the classes that occur) count,
    scaled to all that a random label can be; Wilson's interval. With two classes every error counts.

    >>> labels = np.arange(100) % 10
    >>> [round(value, 3) for value in wrong_label_share(np.eye(10)[labels], labels, 0.95)]
    [0.0, 0.047]
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        return 1.0, 1.0
    lower = len(classes) // 2
    given = np.take_along_axis(logits, labels[:, None], axis=1)
    among = logits[:, classes]
    # Equal classes are ranked before the label, and NaN is no more than anything: an answer that says nothing is last.
    rank = len(classes) - 1 - (among < given).sum(axis=1)
    count, scale = np.count_nonzero(rank >= len(classes) - lower), (len(classes) - 1) / lower
    share, high = count / len(labels), _wilson_high(int(count), len(labels), confidence)
    return min(1.0, float(share * scale)), min(1.0, high * scale)


def _wilson_high(count: int, n: int, confidence: float) -> float:
    """Upper end of Wilson's one-sided interval of a share."""
    z, share = _z(confidence), count / n
    middle = share + z * z / (2 * n)
    return (middle + z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def _z(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf(confidence)


def _mean(hits: npt.NDArray[np.bool_]) -> float:
    return float(hits.mean())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _points(value: float | None) -> str:
    return f"{100 * _number(value):.1f}"


def _percent(value: float | None) -> str:
    return f"{100 * _number(value):.1f}%"
