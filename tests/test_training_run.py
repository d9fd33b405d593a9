"""The training loop against a hand-written one, and what each setting changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import DATA, LEARNING, QUICK, equal, network, run, spec, state_of

from lorac_deploy.batches import ordered_batches, training_batches
from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.data import Dataset, split_validation
from lorac_deploy.train_config import LOSS_SETTINGS
from lorac_deploy.trainer import TrainConfig, evaluate, train
from lorac_deploy.training_report import Progress
from lorac_runtime.errors import DivergenceError
from lorac_runtime.schedule import one_cycle


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
    "loss": "mse",
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
    assert set(CHANGES) | {"threads", "precision", *LOSS_SETTINGS} == {
        field.name for field in dataclasses.fields(TrainConfig)
    }


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_result(name: str) -> None:
    default, changed = network(), network()
    run(default, config=LEARNING, on_progress=spoil_last(default))
    run(changed, config=dataclasses.replace(LEARNING, **{name: CHANGES[name]}), on_progress=spoil_last(changed))
    assert not equal(state_of(default), state_of(changed))


@pytest.mark.parametrize("name", LOSS_SETTINGS)
def test_a_setting_of_a_loss_changes_what_it_trains_and_goes_with_no_other(name: str) -> None:
    values = {"focal_gamma": 4.0, "distillation_weight": 0.9, "temperature": 5.0}
    config = dataclasses.replace(LEARNING, loss=LOSS_SETTINGS[name])
    default, changed = network(), network()
    run(default, config=config)
    run(changed, config=dataclasses.replace(config, **{name: values[name]}))
    assert not equal(state_of(default), state_of(changed))
    with pytest.raises(ValueError, match=f"{name} is a setting of the loss"):
        run(network(), config=dataclasses.replace(LEARNING, **{name: values[name]}))


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


def test_weights_that_became_nan_in_the_last_step_are_found() -> None:
    net = network()

    def spoil(p: Progress) -> None:
        if p.step == p.steps:
            with torch.no_grad():
                net[9].weight.fill_(float("nan"))

    with pytest.raises(DivergenceError, match="the loss became nan in epoch 1"):
        run(net, config=dataclasses.replace(QUICK, epochs=1), on_progress=spoil)
