"""The benchmarks of training steps measure what they say: same network, fair turns, sound statistics."""

from __future__ import annotations

import argparse
import doctest
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import interpreters as environments
from benchmarks import memory, startup, step, step_competitors
from benchmarks import step_options as so
from benchmarks import step_rounds as sr
from benchmarks.step_cases import Case
from benchmarks.step_process import Worker, WorkerError
from benchmarks.step_protocol import Job
from benchmarks.step_worker_torch import use_branches
from lorac_deploy.lora import LoraConfig, attach
from lorac_deploy.lora_layers import LoraConv2d

HERE = f"bench-ort={sys.executable}"  # this environment's onnxruntime does for a test


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A ResNet-20 on images of 8 x 8."""
    return Case("resnet20", tmp_path_factory.mktemp("case") / "resnet20", size=8)


def options(*extra: str) -> tuple[argparse.Namespace, dict[str, Path]]:
    return step.parsed(["--quick", "--python", HERE, *extra])


@pytest.fixture(scope="module")
def found(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of four competitors finds."""
    args, pythons = options("--competitors", "ours-r,forward-twice,torch-branch,native-r")
    result: dict[str, Any] = step.run_case(case, args, pythons, batch=3, threads=1)
    return result


@pytest.mark.parametrize("name", ["interpreters", "step_options", "step_rounds", "step_worker_forward"])
def test_examples_in_docstrings_hold(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert tried.attempted > 0
    assert tried.failed == 0


def test_all_competitors_step_the_same_network_on_the_same_batch(found: dict[str, Any]) -> None:
    assert found["refused"] == {}
    assert found["disagreeing"] == []
    first = {name: losses[0] for name, losses in found["first_losses"].items()}
    assert len(first) == 4
    assert max(first.values()) == pytest.approx(min(first.values()), rel=1e-5)


def test_training_moves_every_competitor_alike_and_a_forward_pass_not_at_all(found: dict[str, Any]) -> None:
    changes = {name: losses[-1] - losses[0] for name, losses in found["first_losses"].items()}
    assert changes["forward-twice"] == 0
    assert changes["ours-r"] < -1e-4
    assert changes["torch-branch"] == pytest.approx(changes["ours-r"], rel=0.005)
    assert changes["native-r"] == pytest.approx(changes["ours-r"], rel=0.05)


def test_a_run_reports_every_counted_step_and_ratios_of_the_same_rounds(found: dict[str, Any]) -> None:
    for name, figures in found["summary"].items():
        assert [len(turn) for turn in found["seconds"][name]] == [2, 2]
        steps = [s for turn in found["seconds"][name] for s in turn]
        reference = [s for turn in found["seconds"]["ours-r"] for s in turn]
        assert (figures["minimum"], figures["median"]) == (min(steps), statistics.median(steps))
        assert figures["ratios"]["ours-r"]["minima"] == pytest.approx(min(steps) / min(reference))
        assert found["peak_bytes"][name] > 20e6
        assert "numpy" in found["environments"][name]["packages"]


def test_a_competitor_on_other_data_is_reported_and_one_that_fails_is_refused_with_its_reason(case: Case) -> None:
    args, pythons = options("--competitors", "forward-twice")
    (competitor,) = args.competitors.values()
    jobs = {str(n): so.plan(case, competitor, pythons, batch=n, threads=1) for n in (2, 3)}
    nowhere = Job(str(case.folder / "nowhere"), str(case.batch(2)), 1, competitor.options)
    jobs["lost"] = (Path(sys.executable), competitor.worker, nowhere)
    found = step.measure(jobs, rounds=1, steps=1, reference="2")
    assert found["disagreeing"] == ["3"]
    assert list(found["refused"]) == ["lost"]
    assert "nowhere" in found["refused"]["lost"]
    table = step.rows(found | {"summary": step.summarized(found, ["2"])}, dict.fromkeys(jobs, "what"), ["2"])
    assert [row[0] for row in table] == ["2", "3", "lost"]
    assert "another loss" in table[1][1]
    assert table[2][2] == "refused"


def test_a_worker_that_ends_leaves_its_last_words() -> None:
    text = r"ended with status 1: .*No module named benchmarks.no_such_module"
    worker = Worker(Path(sys.executable), "benchmarks.no_such_module", Job("", "", 1, {}))
    with worker, pytest.raises(WorkerError, match=text):
        worker.ask("hello")


def recorder(log: list[str], name: str) -> Callable[[], list[float]]:
    def turn() -> list[float]:
        log.append(name)
        return [float(len(log))]

    return turn


def test_everyone_has_one_turn_a_round_and_the_order_varies() -> None:
    log: list[str] = []
    seconds = sr.interleaved({name: recorder(log, name) for name in "abc"}, 12)
    rounds = ["".join(log[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert [order[0] for order in rounds] == ["a", "b", "c"] * 4
    assert len(set(rounds)) > 3
    assert seconds["b"] == [[3 * i + order.index("b") + 1.0] for i, order in enumerate(rounds)]


def test_ratios_are_of_the_same_rounds_only() -> None:
    assert sr.ratio([[4.0], [9.0], [2.0]], [[2.0], [3.0], [4.0]]) == sr.Ratio(1.0, 4 / 3, 2.0)
    with pytest.raises(ValueError, match="zip"):
        sr.ratio([[1.0]], [[1.0], [2.0]])


def test_the_ninetieth_percentile_is_a_step_that_was_measured() -> None:
    assert sr.summary([[float(i) for i in range(1, 11)]]) == sr.Summary(1.0, 5.5, 9.0, 10)


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        ((6, 8), {"kernel_size": 3, "padding": 1}),
        ((6, 8), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        ((6, 8), {"kernel_size": 1, "stride": 2}),
        ((6, 9), {"kernel_size": (1, 3), "stride": (2, 3), "padding": (0, 2), "groups": 3}),
        ((12, 12), {"kernel_size": 5, "padding": 2, "groups": 4, "bias": False}),
    ],
)
def test_pytorch_branches_compute_what_weight_space_does(channels: tuple[int, int], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels[0], 1), nn.Conv2d(*channels, **settings), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 11, 11)
    net(x)
    attach(net, LoraConfig(rank=2, rank_mode="r", small_layers="adapter"))
    layer = net[1]
    assert isinstance(layer, LoraConv2d)
    nn.init.normal_(layer.lora_b)
    wanted = net(x)
    use_branches(net)
    assert type(net[1]).__name__ == "ThinConv2d"
    torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=1e-4)


def test_a_layout_without_thin_branches_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    attach(net, LoraConfig(rank=1, layout="paper"))
    with pytest.raises(ValueError, match="1 has no thin form here"):
        use_branches(net)


def test_peak_memory_is_that_of_the_process() -> None:
    code = (
        "from benchmarks.step_protocol import peak_bytes; before = peak_bytes(); "
        "x = b'1' * 200_000_000; del x; print(peak_bytes() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=environments.ROOT, capture_output=True, text=True, check=True
    )
    assert 190e6 < int(done.stdout) < 210e6


def test_memory_and_startup_measure_fresh_processes(case: Case) -> None:
    args, pythons = options("--competitors", "forward-twice")
    plan = so.plan(case, args.competitors["forward-twice"], pythons, batch=2, threads=1)
    figures = memory.measure(plan, steps=1, repeats=2)
    assert len(figures["runs"]) == 2
    assert figures["peak_bytes"] == max(run["peak_bytes"] for run in figures["runs"])
    assert 10e6 < figures["imported_bytes"] < figures["peak_bytes"]
    (seconds,) = startup.first_step(plan)
    assert 0.05 < seconds < 300


def test_every_competitor_names_a_variant_and_an_environment_that_exist() -> None:
    known = {*step_competitors.variants("resnet18"), step_competitors.SIMPLIFIED}
    for competitor in step_competitors.COMPETITORS.values():
        assert competitor.variant in known
        assert competitor.environment in environments.NAMES
        assert importlib.util.find_spec(competitor.worker) is not None
    for names in (step_competitors.STEP, step_competitors.MEMORY, step_competitors.STARTUP):
        assert set(step_competitors.chosen(names)) == set(names.split(","))


def usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        step.parsed(arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--competitors", "ours-r,theirs"], "no competitors theirs: choose from ours-r,"),
        (["--models", "resnet18,vgg"], "no model vgg: choose from"),
        (["--batch", "8,0"], "8,0: expected numbers from 1 on"),
        (["--python", "bench=x"], "--python wants NAME=PATH with a name of project, bench-ort, bench-onnxsim"),
        (["--rounds", "0", "--python", HERE, "--competitors", "ours-r"], "--rounds and --steps count from 1"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in usage(arguments, capsys)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout where no environment has been made."""
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    return tmp_path


def test_an_environment_that_lacks_is_named_with_the_command(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no environment bench-ort" in (said := usage(["--competitors", "ours-r"], capsys))
    assert "run `python -m benchmarks setup`" in said


def test_the_result_is_written_as_json(tmp_path: Path) -> None:
    so.write(tmp_path / "new" / "x.json", {"a": [1]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": [1]}
