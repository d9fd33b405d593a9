"""The training loop against a hand-written one, resuming to the bit, and what each setting changes."""

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
from training_cases import dataset, equal, network, spec, state_of

from lorac_deploy.batches import ordered_batches, training_batches
from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.data import Dataset, split_validation
from lorac_deploy.lora import LoraConfig, adapter_tensors, detach, fuse
from lorac_deploy.train import DEFAULTS, TrainConfig, TrainReport, evaluate, train
from lorac_deploy.training_report import Progress
from lorac_runtime.errors import CheckpointError, ConversionError, DataError, DivergenceError
from lorac_runtime.schedule import one_cycle

DATA = dataset()
QUICK = TrainConfig(epochs=3, batch_size=10, bn_policy="batch", val_fraction=0.2)
LEARNING = dataclasses.replace(QUICK, epochs=6, lr=0.03)


def run(
    net: nn.Module, data: Dataset = DATA, *, method: str = "full", config: TrainConfig = QUICK, **more
) -> TrainReport:
    return train(net, data, input_spec=spec(data), method=method, config=config, lora=LoraConfig(rank=1), **more)


def by_hand(net: nn.Module, data: Dataset, config: TrainConfig) -> None:
    """Full training with batch statistics, written out."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.momentum, 0.999))
    part = split_validation(data, config.val_fraction, config.seed)[0] if config.val_fraction else data
    per_epoch = -(-len(part) // config.batch_size)
    net.train()
    for epoch in range(config.epochs):
        torch.manual_seed(int(np.random.SeedSequence([config.seed, epoch + 1]).generate_state(1)[0]))
        batches = training_batches(
            part, spec(data), batch_size=config.batch_size, augment="none", seed=config.seed, epoch=epoch + 1
        )
        for step, (x, y) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(
                    epoch * per_epoch + step, config.epochs * per_epoch, peak=config.lr, warmup=config.warmup
                )
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x.contiguous()), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_full_training_is_the_plain_pytorch_loop(optimizer: str) -> None:
    config = TrainConfig(
        epochs=2, batch_size=16, optimizer=optimizer, lr=0.01, momentum=0.8, weight_decay=0.1, warmup=0.5,
        clip_norm=0.5, bn_policy="batch", keep="last", seed=5,
    )  # fmt: skip
    ours, expected = network(), network()
    run(ours, config=config)
    by_hand(expected, DATA, config)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


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
    seen: list[Progress] = []
    found = run(resumed, method=method, config=config, state=tmp_path / "state", on_progress=seen.append)
    assert equal(state_of(resumed), state_of(whole))
    assert without_times(found) == without_times(expected)
    assert seen[0].epoch == epoch


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
    run(network(), config=dataclasses.replace(QUICK, threads=1), state=tmp_path / "state")


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import QUICK, network, run
import dataclasses
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


CHANGES = {
    "epochs": 4,
    "batch_size": 20,
    "optimizer": "sgd",
    "lr": 0.02,
    "momentum": 0.5,
    "weight_decay": 0.2,
    "warmup": 0.8,
    "clip_norm": 0.01,
    "bn_policy": "frozen",
    "augment": "crop",
    "val_fraction": 0.3,
    "keep": "last",
    "seed": 1,
}


def spoil_last(net: nn.Module) -> Callable[[Progress], None]:
    """Empty the head before the last validation, so that the last epoch is not the best."""

    def spoil(p: Progress) -> None:
        if (p.epoch, p.step, p.val_accuracy) == (p.epochs, p.steps, None):
            with torch.no_grad():
                net[9].weight.zero_()

    return spoil


def test_the_list_of_changes_covers_every_setting() -> None:
    assert set(CHANGES) | {"threads"} == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_result(name: str) -> None:
    default, changed = network(), network()
    run(default, config=LEARNING, on_progress=spoil_last(default))
    run(changed, config=dataclasses.replace(LEARNING, **{name: CHANGES[name]}), on_progress=spoil_last(changed))
    assert not equal(state_of(default), state_of(changed))


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


def test_the_epoch_with_the_best_validation_is_kept_and_the_latest_of_equals() -> None:
    net = network()
    report = run(net, config=LEARNING, on_progress=spoil_last(net))
    accuracies = [record.val_accuracy for record in report.history]
    best = max(accuracies)
    assert accuracies[-1] < best
    assert accuracies.count(best) > 1
    assert report.kept_epoch == max(i for i, a in enumerate(accuracies, 1) if a == best)
    held_out = split_validation(DATA, 0.2, 0)[1]
    assert evaluate(net, held_out, spec(DATA))[1] == best == report.val_accuracy


def test_test_images_are_reported_and_decide_nothing() -> None:
    nets = [network(), network(), network()]
    tests = [None, dataset(30, seed=5), dataset(30, seed=6, noise=1.0)]
    reports = [run(net, config=LEARNING, test=test) for net, test in zip(nets, tests, strict=True)]
    assert equal(state_of(nets[0]), state_of(nets[1]))
    assert equal(state_of(nets[0]), state_of(nets[2]))
    assert reports[0].test_accuracy is None
    assert reports[1].test_accuracy == evaluate(nets[1], tests[1], spec(DATA))[1] > reports[2].test_accuracy


def test_validation_images_are_not_trained_on() -> None:
    """Scrambling the labels of the images held out changes no weight of the last epoch."""
    config = dataclasses.replace(QUICK, keep="last")
    held_out = split_validation(Dataset(DATA.images, np.arange(48) % 3, DATA.class_names), 0.2, 0)[1]
    clean = Dataset(DATA.images, np.arange(48) % 3, DATA.class_names)
    scrambled_images = clean.images.copy()
    for image in held_out.images:
        scrambled_images[(clean.images == image).all(axis=(1, 2, 3))] = 255 - image
    nets = [network(), network()]
    for net, images in zip(nets, (clean.images, scrambled_images), strict=True):
        train(net, Dataset(images, clean.labels, clean.class_names), input_spec=spec(clean), config=config)
    assert equal(state_of(nets[0]), state_of(nets[1]))


def test_frozen_statistics_stay_and_batch_statistics_move() -> None:
    for policy, moves in (("frozen", False), ("batch", True)):
        net = network()
        run(net, method="lora-c", config=dataclasses.replace(QUICK, bn_policy=policy))
        assert torch.equal(net[1].running_mean, network()[1].running_mean) != moves


def test_recalibrated_statistics_are_those_of_the_training_part() -> None:
    net, expected = network(), network()
    run(net, method="head", config=dataclasses.replace(QUICK, bn_policy="recalibrate"))
    part = split_validation(DATA, 0.2, 0)[0]
    recalibrate(expected, [x for x, _ in ordered_batches(part, spec(DATA), QUICK.batch_size)])
    torch.testing.assert_close(net[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(net[4].running_var, expected[4].running_var)


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


def test_progress_comes_at_every_step_and_after_validation() -> None:
    seen: list[Progress] = []
    run(network(), on_progress=seen.append)
    steps = -(-len(split_validation(DATA, 0.2, 0)[0]) // 10)
    assert [(p.epoch, p.step) for p in seen if p.val_accuracy is None] == [
        (e, s) for e in (1, 2, 3) for s in range(1, steps + 1)
    ]
    validated = [p for p in seen if p.val_accuracy is not None]
    assert [(p.epoch, p.step, p.steps, p.epochs) for p in validated] == [(e, steps, steps, 3) for e in (1, 2, 3)]
    rates = [p.lr for p in seen if p.val_accuracy is None]
    assert rates == [one_cycle(i, 3 * steps, peak=1e-3, warmup=0.3) for i in range(3 * steps)]


def test_the_reported_loss_is_the_mean_over_images() -> None:
    seen: list[Progress] = []
    report = run(network(), on_progress=seen.append, config=dataclasses.replace(QUICK, batch_size=16, epochs=1))
    sizes = [len(part) for part in np.array_split(np.arange(report.train_images), 3)]
    assert report.history[0].loss == pytest.approx(np.average([p.loss for p in seen[:-1]], weights=sizes))


def test_a_diverging_run_says_so_and_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    net = network()
    config = dataclasses.replace(QUICK, optimizer="sgd", lr=1e30, clip_norm=0.0, warmup=0.0)
    with pytest.raises(
        DivergenceError, match=r"training diverged: the loss became .* in epoch 1.*--lr 1e\+29.*--clip-norm"
    ):
        run(net, config=config, state=tmp_path / "state")
    assert equal(state_of(net), state_of(network()))
    assert not (tmp_path / "state").exists()


def test_weights_that_became_nan_in_the_last_step_are_found() -> None:
    net = network()

    def spoil(p: Progress) -> None:
        if p.step == p.steps:
            with torch.no_grad():
                net[9].weight.fill_(float("nan"))

    with pytest.raises(DivergenceError, match="the loss became nan in epoch 1"):
        run(net, config=dataclasses.replace(QUICK, epochs=1), on_progress=spoil)


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
