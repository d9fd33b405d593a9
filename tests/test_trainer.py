"""Training as a whole: methods, resuming to the bit, reports, refusals."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import DATA, LEARNING, QUICK, dataset, equal, network, run, spec, state_of

from lorac_deploy.batches import ordered_batches
from lorac_deploy.data import Dataset, split_validation
from lorac_deploy.lora import adapter_tensors, detach, fuse
from lorac_deploy.trainer import DEFAULTS, TrainReport, evaluate, train
from lorac_deploy.training_report import Progress
from lorac_runtime.errors import CheckpointError, ConversionError, DataError, DivergenceError


def test_lora_c_trains_adapters_stem_and_head_alone() -> None:
    net = network()
    before = state_of(net)
    report = run(net, method="lora-c", config=dataclasses.replace(QUICK, bn_policy="frozen"))
    changed = {name for name, value in before.items() if not torch.equal(net.state_dict()[name], value)}
    assert changed == {"0.weight", "9.weight"}
    assert adapter_tensors(net)["3.lora_b"].abs().max() > 0
    assert report.trained_parameters == sum(t.numel() for t in adapter_tensors(net).values())
    detach(net)
    assert equal(state_of(net), before)


def test_the_head_alone_trains_with_method_head() -> None:
    net = network()
    before = state_of(net)
    run(net, method="head", config=dataclasses.replace(QUICK, bn_policy="frozen"))
    changed = {name for name, value in before.items() if not torch.equal(net.state_dict()[name], value)}
    assert changed == {"9.weight", "9.bias"}


INTERRUPTIONS = {
    "full, sgd, dropout": ("full", dataclasses.replace(QUICK, optimizer="sgd", augment="crop-flip")),
    "full, adamw, last": ("full", dataclasses.replace(QUICK, keep="last", val_fraction=0.0)),
    "lora-c, frozen": ("lora-c", dataclasses.replace(QUICK, bn_policy="frozen", lr=0.02)),
    "lora-c, recalibrate": ("lora-c", dataclasses.replace(QUICK, bn_policy="recalibrate", lr=0.02)),
    "head": ("head", dataclasses.replace(QUICK, bn_policy="batch", lr=0.05)),
}


@pytest.mark.parametrize("case", INTERRUPTIONS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, case: str, epoch: int) -> None:
    method, config = INTERRUPTIONS[case]
    whole, resumed = network(), network()
    expected = run(whole, method=method, config=config, state=tmp_path / "whole")

    def interrupt(p: Progress) -> None:
        if (p.epoch, p.step) == (epoch, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resumed, method=method, config=config, state=tmp_path / "state", on_progress=interrupt)
    assert equal(state_of(resumed), state_of(network()))  # as it was before
    torch.manual_seed(99)
    seen: list[Progress] = []
    found = run(resumed, method=method, config=config, state=tmp_path / "state", on_progress=seen.append)
    assert equal(state_of(resumed), state_of(whole))
    assert without_times(found) == without_times(expected)
    assert seen[0].epoch == epoch


def test_the_kept_epoch_survives_an_interruption(tmp_path: Path) -> None:
    def spoiling(net: nn.Module, last: int) -> Callable[[Progress], None]:
        def spoil(p: Progress) -> None:
            """Empty the head before each validation but the first, which so remains the best."""
            if p.epoch > last:
                raise KeyboardInterrupt
            if p.epoch > 1 and p.step == p.steps:
                with torch.no_grad():
                    net[9].weight.zero_()

        return spoil

    whole, resumed = network(), network()
    expected = run(whole, config=LEARNING, on_progress=spoiling(whole, 6))
    with pytest.raises(KeyboardInterrupt):
        run(resumed, config=LEARNING, state=tmp_path / "state", on_progress=spoiling(resumed, 3))
    found = run(resumed, config=LEARNING, state=tmp_path / "state", on_progress=spoiling(resumed, 6))
    assert found.kept_epoch == expected.kept_epoch == 1
    assert equal(state_of(resumed), state_of(whole))


def without_times(report: TrainReport) -> TrainReport:
    history = tuple(dataclasses.replace(record, seconds=0.0) for record in report.history)
    return dataclasses.replace(report, history=history, seconds=0.0)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = network(), network()
    run(first, state=tmp_path / "state")
    seen: list[Progress] = []
    run(second, state=tmp_path / "state", on_progress=seen.append)
    assert seen == []
    assert equal(state_of(first), state_of(second))


def test_restart_begins_anew(tmp_path: Path) -> None:
    run(network(), state=tmp_path / "state")
    seen: list[Progress] = []
    run(network(), state=tmp_path / "state", restart=True, on_progress=seen.append)
    assert seen[0].epoch == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": dataclasses.replace(QUICK, epochs=4)}, "epochs was 3, now 4"),
        ({"data": dataset(seed=1)}, "images was .*, now"),
        ({"method": "head"}, "method was full, now head"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, change: dict, text: str) -> None:
    run(network(), state=tmp_path / "state")
    net = network()
    with pytest.raises(CheckpointError, match=f"(?s)was another one.*--restart.*{text}"):
        run(net, state=tmp_path / "state", **change)
    assert equal(state_of(net), state_of(network()))


def test_a_run_from_other_weights_is_another_run(tmp_path: Path) -> None:
    run(network(), state=tmp_path / "state")
    with pytest.raises(CheckpointError, match="starting weights was"):
        run(network(seed=1), state=tmp_path / "state")


def test_the_number_of_threads_may_change_between_sessions(tmp_path: Path) -> None:
    run(network(), state=tmp_path / "state")
    seen: list[Progress] = []
    config = dataclasses.replace(QUICK, threads=1)
    run(network(), config=config, state=tmp_path / "state", on_progress=seen.append)
    assert seen == []  # the same run, finished


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dataclasses
from training_cases import QUICK, network, run
run(network(), config=dataclasses.replace(QUICK, epochs=400), state=Path(sys.argv[2]))
"""


def test_a_killed_process_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(state)])
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    config = dataclasses.replace(QUICK, epochs=400)
    first: list[Progress] = []

    def stop(p: Progress) -> None:
        first.append(p)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network(), config=config, state=state, on_progress=stop)
    assert first[0].epoch > 1


def test_equal_seeds_give_equal_bits_and_leave_the_global_generators_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    nets = [network(), network(), network()]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        run(net, config=dataclasses.replace(QUICK, seed=seed))
    assert torch.equal(torch.rand(3), expected)
    assert equal(state_of(nets[0]), state_of(nets[1]))
    assert not equal(state_of(nets[0]), state_of(nets[2]))


def test_threads_are_set_while_training_and_given_back() -> None:
    before, seen = torch.get_num_threads(), []
    other = 1 if before > 1 else 2
    run(
        network(),
        config=dataclasses.replace(QUICK, threads=other),
        on_progress=lambda _: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {other}
    assert torch.get_num_threads() == before


def test_test_images_are_reported_and_decide_nothing() -> None:
    nets = [network(), network(), network()]
    tests = [None, dataset(30, seed=5), dataset(30, seed=6, noise=1.0)]
    reports = [run(net, config=LEARNING, test=test) for net, test in zip(nets, tests, strict=True)]
    assert equal(state_of(nets[0]), state_of(nets[1]))
    assert equal(state_of(nets[0]), state_of(nets[2]))
    assert reports[0].test_accuracy is None
    assert reports[1].test_accuracy == evaluate(nets[1], tests[1], spec(DATA))[1] > reports[2].test_accuracy


def test_the_report_tells_what_happened() -> None:
    net = network()
    report = run(net, config=QUICK, test=dataset(30, seed=5))
    part, held_out = split_validation(DATA, 0.2, 0)
    assert (report.train_images, report.val_images) == (len(part), len(held_out))
    assert report.accuracy_before == evaluate(network(), held_out, spec(DATA))[1]
    assert report.trained_parameters == report.model_parameters == sum(p.numel() for p in net.parameters())
    assert report.config["lr"] == 1e-3
    assert report.config["epochs"] == 3
    assert [record.epoch for record in report.history] == [1, 2, 3]
    assert report.seconds == sum(record.seconds for record in report.history) > 0


def test_a_diverging_run_says_so_and_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    net = network()
    config = dataclasses.replace(QUICK, optimizer="sgd", lr=1e30, clip_norm=0.0, warmup=0.0)
    with pytest.raises(
        DivergenceError, match=r"training diverged: the loss became .* in epoch 1.*--lr 1e\+29.*--clip-norm"
    ):
        run(net, config=config, state=tmp_path / "state")
    assert equal(state_of(net), state_of(network()))
    assert not (tmp_path / "state").exists()


def test_fusing_after_training_gives_the_same_outputs() -> None:
    net = network()
    run(net, method="lora-c", config=dataclasses.replace(QUICK, bn_policy="frozen", lr=0.05))
    x = next(ordered_batches(DATA, spec(DATA), 8))[0]
    torch.testing.assert_close(fuse(net)(x), net.eval()(x), rtol=1e-5, atol=1e-6)


def test_parameters_end_in_the_usual_memory_format() -> None:
    net = network()
    run(net)
    assert all(value.is_contiguous() for value in net.state_dict().values())


def test_the_default_settings_are_the_methods_own() -> None:
    report = train(network(), DATA, input_spec=spec(DATA), method="head")
    assert len(report.history) == DEFAULTS["head"].epochs
    assert report.bn_policy == "frozen"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"method": "lora"}, ValueError, "method 'lora' is not one of lora-c"),
        ({"data": DATA.select(np.flatnonzero(DATA.labels == 1))}, DataError, "images of 1 class"),
        (
            {"data": Dataset(DATA.images, DATA.labels, (*DATA.class_names, "white"))},
            ValueError,
            "3 outputs, the data 4",
        ),
        ({"test": dataset(side=9)}, DataError, r"images are \(3, 9, 9\)"),
        ({"net": nn.Sequential(nn.Conv2d(1, 3, 3))}, ConversionError, r"cannot process images of \(3, 8, 8\)"),
        ({"config": dataclasses.replace(QUICK, batch_size=1)}, ValueError, "leave one image alone"),
        ({"data": DATA.select(np.arange(3))}, DataError, "too few to hold out"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: dict, error: type[Exception], text: str) -> None:
    given = {"net": network()} | change
    net = given.pop("net")
    before = state_of(net)
    with pytest.raises(error, match=text):
        run(net, **given)
    assert equal(state_of(net), before)
    assert type(net[0]) is nn.Conv2d
