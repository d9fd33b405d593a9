"""The gate's formulas, against simulation and against counts written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.gate import (
    Answers,
    GateConfig,
    by_class_accuracy,
    judged,
    paired_gain,
    right,
    wrong_label_share,
)

CLASSES = 5


def logits_for(answers: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def answering(labels: np.ndarray, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """Answers of which a share is right, and the others are wrong."""
    wrong = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
    return np.where(rng.random(len(labels)) < accuracy, labels, wrong)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.9, 0.9), (0.6, 0.5), (0.97, 0.97)])
@pytest.mark.parametrize("count", [20, 60, 300])
def test_a_model_that_is_not_better_seldom_passes(before: float, after: float, count: int) -> None:
    """At 95 % confidence one in twenty; 3,000 draws tell 5 % from 6.5 %."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    passed = 0
    for _ in range(3000):
        first, second = (logits_for(answering(labels, share, rng)) for share in (before, after))
        passed += paired_gain(Answers(first, second, labels), 0.95)[1] > 0
    assert passed / 3000 < 0.065


def test_the_lower_end_is_that_of_bonett_and_price_by_hand() -> None:
    """Ten won, two lost of 40: p = 11/42, q = 3/42, error = sqrt((14/42 - (8/42)^2) / 42)."""
    labels = np.zeros(40, np.int64)
    before, after = np.zeros(40, np.int64), np.zeros(40, np.int64)
    before[:10] = 1
    after[10:12] = 1
    gain, low = paired_gain(Answers(logits_for(before), logits_for(after), labels), 0.95)
    assert gain == pytest.approx(0.2)
    assert low == pytest.approx(8 / 42 - 1.6448536 * math.sqrt((14 / 42 - (8 / 42) ** 2) / 42))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_wrong_labels_are_estimated(share: float, classes: int) -> None:
    """A model that knows the truth, 20,000 labels of which a share was replaced by another one at random."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, classes, 20_000)
    logits = rng.normal(size=(20_000, classes)) + 9 * np.eye(classes)[truth]
    replaced = rng.random(20_000) < share
    labels = np.where(replaced, (truth + rng.integers(1, classes, 20_000)) % classes, truth)
    estimate, high = wrong_label_share(logits, labels, 0.95)
    assert estimate == pytest.approx(share, abs=0.015)
    assert estimate <= high < estimate + 0.02


def test_hard_samples_are_no_wrong_labels() -> None:
    """60 % right; where it errs the label is ranked second."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 10, 1000)
    answers = np.where(rng.random(1000) < 0.6, labels, (labels + 1) % 10)
    logits = rng.normal(size=(1000, 10)) + 20 * np.eye(10)[answers] + 10 * np.eye(10)[labels]
    assert wrong_label_share(logits, labels, 0.95)[1] < 0.01


def test_classes_that_do_not_occur_do_not_hide_wrong_labels() -> None:
    """A model of 1000 classes that learned that ten occur ranks these first, wrong labels included."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 10, 5000)
    labels = np.where(rng.random(5000) < 0.4, rng.integers(0, 10, 5000), truth)
    logits = rng.normal(size=(5000, 1000))
    logits[:, :10] += 50
    logits[np.arange(5000), truth] += 50
    assert wrong_label_share(logits, labels, 0.95)[0] == pytest.approx(0.36, abs=0.03)


def test_the_same_answer_to_everything_looks_like_wrong_labels() -> None:
    labels = np.arange(60) % CLASSES
    assert wrong_label_share(np.zeros((60, CLASSES), np.float32), labels, 0.95)[1] == 1.0
    assert wrong_label_share(np.full((60, CLASSES), np.nan, np.float32), labels, 0.95) == (1.0, 1.0)


def case(before: float, after: float, count: int = 200, *, anchors: tuple[float, float] | None = None) -> tuple:
    rng = np.random.default_rng(4)
    labels = np.arange(count) % CLASSES
    made = Answers(logits_for(answering(labels, before, rng)), logits_for(answering(labels, after, rng)), labels)
    if anchors is None:
        return made, None
    first, second = (
        logits_for(np.where(np.arange(count) < share * count, labels, (labels + 1) % CLASSES)) for share in anchors
    )
    return made, Answers(first, second, labels)


def test_a_better_model_is_accepted_and_the_figures_are_those_of_the_samples() -> None:
    held_out, anchors = case(0.3, 0.95, anchors=(0.9, 0.9))
    verdict = judged(held_out, anchors, GateConfig())
    assert verdict.accepted
    assert verdict.reasons == ()
    assert verdict.held_out == 200
    assert verdict.before == np.mean(held_out.before.argmax(1) == held_out.labels)
    assert verdict.after == np.mean(held_out.after.argmax(1) == held_out.labels)
    assert verdict.gain == pytest.approx(verdict.after - verdict.before)


@pytest.mark.parametrize(
    ("config", "anchors", "reason"),
    [
        (GateConfig(margin=0.9), None, "not more than 90.0"),
        (GateConfig(), (0.9, 0.8), "anchors fell from 90.0% to 80.0%: more than 5.0 points"),
        (GateConfig(wrong_labels=0.01), None, "of the labels look wrong"),
    ],
)
def test_each_demand_is_reason_enough(config: GateConfig, anchors: tuple[float, float] | None, reason: str) -> None:
    verdict = judged(*case(0.3, 0.95, anchors=anchors), config)
    assert not verdict.accepted
    assert [reason in text for text in verdict.reasons] == [True]


def test_anchors_may_lose_what_is_stated() -> None:
    assert judged(*case(0.3, 0.95, anchors=(0.9, 0.85)), GateConfig()).accepted
    assert judged(*case(0.3, 0.95, anchors=(0.9, 0.1)), GateConfig(anchor_loss=1.0)).accepted


def test_answering_the_most_frequent_class_is_no_gain() -> None:
    """90 % of the samples are of class 0: always saying so is right more often, and worse."""
    rng = np.random.default_rng(5)
    labels = np.where(rng.random(300) < 0.9, 0, rng.integers(1, CLASSES, 300))
    held_out = Answers(logits_for(answering(labels, 0.6, rng)), logits_for(np.zeros(300, np.int64)), labels)
    verdict = judged(held_out, None, GateConfig(wrong_labels=1.0))
    assert verdict.gain_low is not None
    assert verdict.gain_low > 0.2
    assert not verdict.accepted
    assert "mean of accuracies by class did not rise" in verdict.reasons[0]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=50))
def test_accuracy_by_class_is_the_mean_of_means(rows: list[tuple[int, bool]]) -> None:
    labels, hits = np.array([label for label, _ in rows]), np.array([hit for _, hit in rows])
    by_hand: dict[int, list[bool]] = {}
    for label, hit in rows:
        by_hand.setdefault(label, []).append(hit)
    expected = sum(sum(found) / len(found) for found in by_hand.values()) / len(by_hand)
    assert by_class_accuracy(hits, labels) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "needed"), [(20, 4), (60, 4), (1000, 5)])
def test_few_samples_prove_only_large_gains(count: int, needed: int) -> None:
    """What the documents say: of 20 samples 4 more have to be right; of 60 as many, which is 7 points."""
    labels = np.arange(count) % CLASSES
    for won in range(8):
        wrong = np.where(np.arange(count) < won, (labels + 1) % CLASSES, labels)
        low = paired_gain(Answers(logits_for(wrong), logits_for(labels), labels), 0.95)[1]
        assert (low > 0) == (won >= needed)


def test_answers_that_are_no_numbers_are_wrong() -> None:
    logits = np.array([[np.nan, np.nan], [np.inf, 0.0], [0.0, 1.0]])
    assert right(logits, np.array([0, 0, 1])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "wrong",
    [{"margin": -0.1}, {"margin": 2.0}, {"anchor_loss": float("nan")}, {"confidence": 1.0}, {"wrong_labels": -1.0}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateConfig(**wrong)
