"""The cross-format certificate on models that are known by construction."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from lorac_exporters.certificate import Answers, Certificate, Pair, Tolerance, compare

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 3), dtype=np.uint8)
WEIGHT = np.random.default_rng(1).standard_normal((12, 5))
LABELS = np.argmax(IMAGES.reshape(40, 12) / 255 @ WEIGHT, axis=1)
TIGHT = Tolerance(1e-5, 1.0)


def model(change: Callable[[np.ndarray], np.ndarray] = lambda logits: logits, name: str = "logits") -> Answers:
    """A linear classifier, its logits changed."""
    return lambda images: {name: change(images.reshape(len(images), 12) / 255 @ WEIGHT).astype(np.float64)}


def certificate(candidate: Answers, tolerance: Tolerance = TIGHT, *, size: int = 16) -> Certificate:
    batches = [(IMAGES[i : i + size], LABELS[i : i + size]) for i in range(0, 40, size)]
    return compare({"a": model(), "b": candidate}, [Pair("a", "b", tolerance)], batches)


def test_equal_models_pass_and_their_figures_are_exact() -> None:
    found = certificate(model())
    (output,) = found.pairs[0].outputs
    assert found.ok
    assert (output.output, output.max_abs, output.max_rel, output.agreement) == ("logits", 0, 0, 1)
    assert found.accuracies == {"a": {"logits": 1.0}, "b": {"logits": 1.0}}
    assert found.images == 40


def test_the_largest_difference_is_found_in_whichever_batch_it_lies() -> None:
    logits = model()(IMAGES)["logits"]
    for index in (0, 20, 39):
        changed = logits.copy()
        changed[index, 3] += 0.25
        position = iter(range(0, 40, 16))

        def answers(images: np.ndarray, changed: np.ndarray = changed, position: object = position) -> dict:
            start = next(position)  # type: ignore[call-overload]
            return {"logits": changed[start : start + len(images)]}

        (output,) = certificate(answers).pairs[0].outputs
        assert output.max_abs == pytest.approx(0.25, abs=1e-12)
        assert output.max_rel == pytest.approx(0.25 / max(1, np.abs(logits).max()))


def test_small_logits_are_measured_against_1_and_large_ones_against_themselves() -> None:
    for scale, reach in ((1e-3, 1.0), (1e3, 1e3 * np.abs(model()(IMAGES)["logits"]).max())):
        both = {"a": model(lambda x, s=scale: x * s), "b": model(lambda x, s=scale: x * s + 1e-4)}
        (report,) = compare(both, [Pair("a", "b", TIGHT)], [(IMAGES, None)]).pairs
        assert report.outputs[0].max_rel == pytest.approx(1e-4 / reach, rel=1e-6)


def test_other_numbers_with_the_same_answers_are_inaccurate_and_other_answers_fail() -> None:
    assert certificate(model(lambda x: x + 1e-6)).pairs[0].verdict == "pass"
    assert certificate(model(lambda x: x * 1.01)).pairs[0].verdict == "inaccurate"
    assert certificate(model(lambda x: -x)).pairs[0].verdict == "fail"
    assert not certificate(model(lambda x: x * 1.01)).ok
    assert not certificate(model(lambda x: -x)).ok


def test_the_agreement_is_the_share_of_equal_first_classes() -> None:
    def swapped(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[:4] = -logits[:4]
        return logits

    found = certificate(model(swapped), Tolerance(100.0, 0.9), size=40)
    assert found.pairs[0].outputs[0].agreement == 0.9
    assert found.ok
    assert found.accuracies["b"]["logits"] == 0.9
    assert not certificate(model(swapped), Tolerance(100.0, 0.91), size=40).ok


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_fail_and_stay_out_of_the_json(value: float) -> None:
    def broken(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[-1, 2] = value
        return logits

    for found in (certificate(model(broken)), compare_reversed(model(broken))):
        assert found.pairs[0].verdict == "fail"
        assert "not finite" in found.pairs[0].outputs[0].problem
        json.dumps(found.to_dict(), allow_nan=False)


def compare_reversed(reference: Answers) -> Certificate:
    return compare({"a": reference, "b": model()}, [Pair("a", "b", TIGHT)], [(IMAGES, None)])


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        (model(lambda x: x[:, :4]), "shape (16, 4), expected (16, 5)"),
        (model(lambda x: x[:1]), "shape (1, 5)"),
        (model(name="scores"), "candidate has no such output"),
    ],
)
def test_outputs_of_another_shape_or_name_fail_and_are_named(candidate: Answers, text: str) -> None:
    found = certificate(candidate)
    assert not found.ok
    assert text in " ".join(output.problem for output in found.pairs[0].outputs)


def test_a_fault_in_one_batch_is_not_forgotten_in_the_next() -> None:
    calls = []

    def once(images: np.ndarray) -> dict[str, np.ndarray]:
        calls.append(1)
        logits = model()(images)["logits"]
        return {"logits": logits * np.nan if len(calls) == 1 else logits}

    assert not certificate(once).ok


def test_a_model_that_answers_to_too_few_images_fails_even_if_its_partner_does_too() -> None:
    short = model(lambda x: x[:1])
    found = compare({"a": short, "b": short}, [Pair("a", "b", TIGHT)], [(IMAGES, None)])
    assert not found.ok
    assert "1 answers for 40 images" in found.pairs[0].outputs[0].problem


def test_every_output_is_judged_by_itself() -> None:
    def two(factor: float) -> Answers:
        return lambda images: {**model()(images), **model(lambda x: factor * x, "aux")(images)}

    (report,) = compare({"a": two(1.0), "b": two(1.01)}, [Pair("a", "b", TIGHT)], [(IMAGES, None)]).pairs
    assert {o.output: o.verdict(TIGHT) for o in report.outputs} == {"logits": "pass", "aux": "inaccurate"}
    assert report.verdict == "inaccurate"


def test_a_certificate_that_compared_nothing_is_not_ok() -> None:
    models = {"a": model(), "b": model()}
    assert not compare(models, [], [(IMAGES, None)]).ok
    assert not compare(models, [Pair("a", "b", TIGHT)], []).ok
    assert not compare(models, [Pair("a", "b", TIGHT)], [(IMAGES[:0], None)]).ok
    assert not compare({"a": lambda i: {}, "b": lambda i: {}}, [Pair("a", "b", TIGHT)], [(IMAGES, None)]).ok


def test_only_models_that_a_pair_names_run_and_progress_counts_images() -> None:
    def unused(images: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError

    heard: list[int] = []
    models = {"a": model(), "b": model(), "c": unused}
    compare(models, [Pair("a", "b", TIGHT)], [(IMAGES[:30], None), (IMAGES[30:], None)], on_batch=heard.append)
    assert heard == [30, 40]


def test_pairs_of_unknown_models_and_of_one_with_itself_are_refused() -> None:
    for pair in (Pair("a", "c", TIGHT), Pair("a", "a", TIGHT)):
        with pytest.raises(ValueError, match="two of a, b are needed"):
            compare({"a": model(), "b": model()}, [pair], [(IMAGES, None)])


@pytest.mark.parametrize(
    ("relative", "agreement"), [(-1.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (0.1, 1.1), (0.1, -0.1)]
)
def test_tolerances_out_of_range_are_refused(relative: float, agreement: float) -> None:
    with pytest.raises(ValueError, match="got"):
        Tolerance(relative, agreement)
