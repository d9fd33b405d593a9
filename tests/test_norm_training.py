"""Training in PyTorch by the methods of biases and batch normalisation, and by losses without labels."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from norm_networks import Net, network
from torch import nn

from lorac_deploy.batches import ordered_batches
from lorac_deploy.batchnorm import bn_tensors, recalibrate
from lorac_deploy.commands.export_training_artifact import main as export_command
from lorac_deploy.commands.train import main as train_command
from lorac_deploy.data import Dataset, input_spec
from lorac_deploy.lora import detach, report_of
from lorac_deploy.losses import LOSSES
from lorac_deploy.train_config import DEFAULTS
from lorac_deploy.trainer import TrainReport, train
from lorac_runtime.manifest import LOSSES as DEVICE_LOSSES


def data(seed: int = 0) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    return Dataset(images, np.random.default_rng(seed).permutation(np.arange(40) % 4), tuple("abcd"))


def trained(method: str, dataset: Dataset | None = None, **changes: object) -> tuple[Net, TrainReport]:
    dataset = dataset or data()
    config = dataclasses.replace(DEFAULTS[method], **({"batch_size": 10, "keep": "last"} | changes))  # type: ignore[arg-type]
    net = network()
    return net, train(net, dataset, input_spec=input_spec(dataset.images), method=method, config=config)


def test_the_losses_are_those_of_a_device() -> None:
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    assert set(LOSSES) | {"focal", "distillation", "l1"} == set(DEVICE_LOSSES)
    one_hot, p = torch.eye(4)[labels], logits.softmax(1)
    expected = {
        "cross_entropy": -(one_hot * p.log()).sum(1).mean(),
        "entropy": -(p * p.log()).sum(1).mean(),
        "mse": ((logits - one_hot) ** 2).mean(),
        "binary_cross_entropy": -(one_hot * logits.sigmoid().log() + (1 - one_hot) * (-logits).sigmoid().log()).mean(),
    }
    for name, loss in LOSSES.items():
        torch.testing.assert_close(loss(logits, labels), expected[name])


@pytest.mark.parametrize("method", ["bias", "bn", "tent"])
def test_only_what_the_method_trains_changes(method: str) -> None:
    net, report = trained(method, epochs=3, lr=0.01)
    before, after = network().state_dict(), net.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n]) and "tracked" not in n and "running" not in n}
    assert changed == set(report_of(net).full)
    moved = any(not torch.equal(before[n], after[n]) for n in before if "running" in n)
    assert moved == (method == "tent")
    assert report.history[-1].loss < report.history[0].loss
    plain = copy.deepcopy(net)
    detach(plain)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


def test_tent_makes_no_use_of_labels() -> None:
    one, other = (trained("tent", data(seed), epochs=2, val_fraction=0.0)[0] for seed in (0, 1))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="method tent does not go with loss 'cross_entropy': choose entropy"):
        trained("tent", loss="cross_entropy")


def test_recalibration_is_forward_passes_and_no_epoch() -> None:
    net, report = trained("recalibrate", val_fraction=0.0)
    expected: nn.Module = network()
    batches = ordered_batches(data(), input_spec(data().images), 10)
    recalibrate(expected, (images for images, _ in batches))
    torch.testing.assert_close(bn_tensors(net), bn_tensors(expected), rtol=0, atol=0)
    assert (report.history, report.trained_parameters, report.val_accuracy) == ((), 0, None)
    _, watched = trained("recalibrate", val_fraction=0.25)
    assert watched.accuracy_before is not None
    assert watched.val_accuracy is not None


def test_the_accuracy_before_is_that_of_the_network_as_it_came() -> None:
    dataset = data()
    still, _ = (trained("head", dataset, epochs=1, val_fraction=0.5)[1].accuracy_before for _ in "12")
    assert trained("recalibrate", dataset, val_fraction=0.5)[1].accuracy_before == still


@pytest.mark.parametrize("command", ["train", "export"])
def test_the_commands_refuse_settings_of_steps_where_there_are_none(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "train": ["--data", "digits", "--base", "base", "--out", "out"],
        "export": ["--checkpoint", "base", "--out", "out"],
    }[command]
    run = {"train": train_command, "export": export_command}[command]
    with pytest.raises(SystemExit):
        run([*line, "--method", "recalibrate", "--epochs", "3"])
    assert (
        "--epochs changes nothing with --method recalibrate, which makes no training steps" in capsys.readouterr().err
    )
