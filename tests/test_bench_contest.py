"""Contests of model files: mirrored turns, fresh processes, verdicts that follow from what the processes say."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorac_deploy.bench import contest as ct
from lorac_deploy.bench.processes import WorkerError

EFFORT = ct.Effort(looks=(3, 5), seconds=0.1, fewest=2, turn=0.02, warm=0.1)
Hold = Callable[..., ct.Outcome]
Requests = list[tuple[int, dict]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Requests]:
    """Workers are stand-ins; what they were asked, in order, with the process."""
    path = tmp_path / "log"
    monkeypatch.setattr(ct, "WORKER", Path(__file__).with_name("bench_worker.py"))
    monkeypatch.setenv("BENCH_LOG", str(path))
    return lambda: [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    def call(*names: str, effort: ct.Effort = EFFORT, margin: float = 0.01) -> ct.Outcome:
        entries = tuple(ct.Entry(name, tmp_path / f"{name}.onnx", tmp_path / "feeds.npz", margin) for name in names)
        return ct.hold(ct.Contest("onnx", Path(sys.executable), entries), effort)

    return call


def asked(requests: Requests, what: str) -> dict[int, list[dict]]:
    """Requests of one kind by process, in order."""
    found: dict[int, list[dict]] = {}
    for process, request in requests:
        if request["do"] == what:
            found.setdefault(process, []).append(request)
    return found


def test_equal_files_are_the_same_after_the_first_look(hold: Hold, log: Callable[[], Requests]) -> None:
    found = hold("base", "fused")
    assert found.against["fused"].verdict == "same"
    assert found.processes == 3
    assert len(asked(log(), "open")) == 3


@pytest.mark.parametrize(("name", "ratio"), [("x1.05", 1.05), ("x0.90", 0.9)])
def test_a_slower_or_faster_file_is_different_by_as_much(hold: Hold, log: object, name: str, ratio: float) -> None:
    test = hold("base", name).against[name]
    assert test.verdict == "different"
    assert test.ratio == pytest.approx(ratio, rel=1e-3)
    assert test.low < ratio < test.high


def test_a_noisy_file_is_measured_to_the_last_look_and_not_judged(hold: Hold, log: Callable[[], Requests]) -> None:
    found = hold("base", "noisy", "x1.20")
    assert found.against["noisy"].verdict == "too noisy"
    assert found.against["x1.20"].verdict == "different"
    assert found.processes == 5
    names = [{r["name"].split("#")[0] for r in requests} for requests in asked(log(), "open").values()]
    assert names == [{"base", "noisy", "x1.20"}] * 3 + [{"base", "noisy"}] * 2, "what is judged leaves"
    assert found.against["x1.20"].observations == 3


def test_a_file_that_will_hardly_be_judged_is_given_up_after_the_second_look(
    hold: Hold, log: Callable[[], Requests]
) -> None:
    effort = ct.Effort(looks=(3, 5, 9), seconds=0.1, fewest=2, turn=0.02, warm=0.1)
    found = hold("base", "noisy", "x1.20", effort=effort)
    assert found.against["noisy"].verdict == "too noisy"
    assert (found.processes, found.against["noisy"].observations) == (5, 5)


def test_files_are_opened_twice_in_mirrored_order_and_rotated(hold: Hold, log: Callable[[], Requests]) -> None:
    hold("base", "a", "b")
    orders = [[r["name"] for r in requests] for requests in asked(log(), "open").values()]
    assert orders == [
        ["base#0", "a#0", "b#0", "b#1", "a#1", "base#1"],
        ["a#0", "b#0", "base#0", "base#1", "b#1", "a#1"],
        ["b#0", "base#0", "a#0", "a#1", "base#1", "b#1"],
    ]


def test_turns_are_mirrored_from_round_to_round(hold: Hold, log: Callable[[], Requests]) -> None:
    hold("base", "a")
    for requests in asked(log(), "turns").values():
        first, second = (r["names"] for r in requests)
        assert first == ["base#0", "a#0", "a#1", "base#1"] or first == ["a#0", "base#0", "base#1", "a#1"]
        assert second == first[::-1]
        assert all(r["counts"] == [2] * 4 for r in requests), "0.02 s of runs that take 0.01 s"


def test_a_file_that_a_runtime_refuses_is_named_and_the_others_go_on(hold: Hold, log: object) -> None:
    found = hold("base", "broken", "fused")
    assert found.refused == {"broken": "NotImplemented: this operator"}
    assert set(found.timings) == {"base", "fused"}


def test_a_reference_that_is_refused_ends_the_contest_with_the_reason(hold: Hold, log: object) -> None:
    with pytest.raises(WorkerError, match="NotImplemented: this operator"):
        hold("broken", "fused")


def test_times_are_those_that_were_measured(hold: Hold, log: object) -> None:
    found = hold("base", "x1.50").timings["x1.50"]
    assert found.runs == 3 * 2 * 2 * 2, "processes, copies, rounds, runs of a turn"
    assert 0.015 <= found.minimum <= found.median <= found.ninetieth <= 0.0151
    assert (found.load, found.first) == (0.5, 0.25)
    assert len(found.samples) == found.runs


def test_times_of_files_that_went_further_are_those_of_the_same_processes(hold: Hold, log: object) -> None:
    found = hold("base", "noisy", "x1.20")
    assert found.processes == 5
    assert {timing.runs for timing in found.timings.values()} == {3 * 2 * 2 * 2}


def test_a_wider_margin_makes_a_small_difference_the_same(hold: Hold, log: object) -> None:
    assert hold("base", "x1.02", margin=0.03).against["x1.02"].verdict == "same"


def test_the_least_time_of_both_copies_decides() -> None:
    rounds = {
        "base#0": [[1.0, 5.0], [2.0]],
        "base#1": [[2.0], [4.0]],
        "other#0": [[9.0], [3.0]],
        "other#1": [[2.0], [8.0]],
    }
    assert ct._file_to_file(rounds, "base", "other") == pytest.approx((math.log(3 / 1) + math.log(2 / 2)) / 2)
    assert ct._copy(rounds, "base") == pytest.approx(math.log(2))


def test_samples_are_limited_and_spread(hold: Hold, log: object) -> None:
    effort = ct.Effort(looks=(3,), seconds=4.81, turn=0.02, warm=0.1)
    found = hold("base", effort=effort).timings["base"]
    assert found.runs == 960, "3 processes, 2 copies, 80 rounds of 2 runs and one that is not counted"
    assert ct.SAMPLES <= len(found.samples) < 2 * ct.SAMPLES


def test_workers_are_isolated_from_packages_beside_them(tmp_path: Path) -> None:
    contest = ct.Contest("onnx", Path("python"), (), threads=1)
    interpreter, isolated, script, job = ct.command(contest)
    assert (interpreter, isolated, Path(script).name) == ("python", "-I", "worker.py")
    assert len(json.loads(job)["cores"]) == 1
