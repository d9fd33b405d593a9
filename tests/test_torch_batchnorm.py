"""BN policies in PyTorch (lorac_deploy.batchnorm)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorac_deploy.batchnorm import apply_policy, bn_tensors, recalibrate, restore_policy
from lorac_runtime.errors import DataError


def net(seed: int = 0) -> nn.Sequential:
    """Two BN layers, the second behind a dropout, with statistics unlike the start."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    for layer in (module[1], module[5]):
        for value in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
            value.uniform_(0.5, 2.0)
    return module


def batches(count: int = 3, size: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 9, 9, generator=generator) for _ in range(count)]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    state = module.state_dict()
    assert list(state) == list(before)
    return {name for name in state if not torch.equal(state[name], before[name])}


@pytest.mark.parametrize("policy", ["frozen", "recalibrate"])
def test_frozen_layers_use_and_keep_their_statistics_under_train(policy: Any) -> None:
    module, x = net(), batches()[0]
    expected, before = module[:2].eval()(x), snapshot(module)
    assert apply_policy(module, policy) == ("1", "5")
    module.train()
    assert torch.equal(module[:2](x), expected)
    assert moved(module, before) == set()
    assert module[3].training


def test_batch_policy_uses_batch_statistics_and_moves_the_running_ones() -> None:
    module, x = net(), batches()[0]
    before = snapshot(module)
    apply_policy(module, "batch")
    out = module.train()[:2](x)
    normalised = (out - module[1].bias.view(-1, 1, 1)) / module[1].weight.view(-1, 1, 1)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert moved(module, before) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("training", [True, False])
def test_restore_undoes_frozen_to_the_class_and_the_mode(kind: Any, training: bool) -> None:
    module = nn.Sequential(kind(4)).train(training)
    before = snapshot(module)
    apply_policy(module, "frozen")
    assert type(module[0]) is not kind
    assert isinstance(module[0], kind)
    assert restore_policy(module) == ("0",)
    assert type(module[0]) is kind
    assert module[0].training is training
    assert moved(module, before) == set()
    assert module.train()[0].training


def test_frozen_survives_copying_and_pickling_and_the_copy_is_independent() -> None:
    module = net()
    apply_policy(module, "frozen")
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert not twin.train()[1].training
        restore_policy(twin)
        assert twin.train()[1].training
        assert not module.train()[1].training


def test_a_frozen_network_can_be_exported() -> None:
    module = net().eval()
    expected = module(batches()[0])
    apply_policy(module, "frozen")
    program = torch.export.export(module.train().eval(), (batches()[0],))
    torch.testing.assert_close(program.module()(batches()[0]), expected)


class OwnNorm(nn.BatchNorm2d):
    """A subclass of nn.BatchNorm2d."""


def test_layers_that_cannot_be_frozen_are_all_named_and_nothing_changes() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2), OwnNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"(?s)1 is a OwnNorm.*2 keeps no running statistics"):
        apply_policy(module, "frozen")
    assert type(module[0]) is nn.BatchNorm2d
    assert apply_policy(module, "batch") == ("0", "1", "2")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'eval' is not one of frozen, batch, recalibrate"):
        apply_policy(net(), "eval")  # type: ignore[arg-type]


def test_recalibrated_statistics_are_the_mean_over_batches_of_each_batches_own() -> None:
    module, data = net(), batches()
    assert recalibrate(module, iter(data)) == 3
    inputs = [module[0](x) for x in data]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3), unbiased=True) for x in inputs]).mean(0)
    torch.testing.assert_close(module[1].running_mean, mean.detach())
    torch.testing.assert_close(module[1].running_var, var.detach())


def test_later_layers_see_batch_statistics_before_them_and_no_dropout() -> None:
    module, data = net(), batches(1)
    recalibrate(module, data)
    normed = nn.functional.batch_norm(module[0](data[0]), None, None, module[1].weight, module[1].bias, training=True)
    inputs = module[4](normed.relu())
    torch.testing.assert_close(module[5].running_mean, inputs.mean((0, 2, 3)).detach())


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_moves_only_statistics_and_freezes_them(training: bool) -> None:
    module = net().train(training)
    module[3].eval()
    before, momentum = snapshot(module), module[1].momentum
    recalibrate(module, batches())
    leaves = ("running_mean", "running_var", "num_batches_tracked")
    assert moved(module, before) == {f"{n}.{leaf}" for n in (1, 5) for leaf in leaves}
    assert (module.training, module[3].training, module[1].momentum) == (training, False, momentum)
    assert not module.train()[1].training
    assert all(value.grad is None for value in module.parameters())
    after = snapshot(module)
    module.train()(batches()[0])
    assert moved(module, after) == set()


def test_recalibrating_twice_forgets_the_first_time() -> None:
    module, other = net(), net()
    recalibrate(module, batches(seed=7))
    recalibrate(module, batches())
    recalibrate(other, batches())
    assert moved(module, snapshot(other)) == set()


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ([], ValueError, "no batch was given"),
        ([*batches(1), torch.full((4, 2, 9, 9), torch.nan)], DataError, "statistics of 1, 5 are not finite"),
        ([*batches(1), torch.zeros(4, 3, 9, 9)], RuntimeError, "expected input"),
    ],
)
def test_a_failed_recalibration_leaves_everything_as_it_was(data: list[Tensor], error: Any, text: str) -> None:
    module = net().train()
    before, momentum = snapshot(module), module[1].momentum
    with pytest.raises(error, match=text):
        recalibrate(module, data)
    assert moved(module, before) == set()
    assert [m.training for m in module.modules()] == [True] * 7
    assert module[1].momentum == momentum
    assert type(module[1]) is nn.BatchNorm2d


def test_a_network_without_bn_cannot_be_recalibrated() -> None:
    with pytest.raises(ValueError, match="no batch normalisation to recalibrate"):
        recalibrate(nn.Sequential(nn.Conv2d(2, 2, 3)), batches())


def test_bn_tensors_are_copies_by_state_dict_key() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    tensors = bn_tensors(module)
    assert list(tensors) == [
        *(f"0.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
        "1.running_mean",
        "1.running_var",
    ]
    tensors["0.weight"].zero_()
    assert torch.equal(module[0].weight, torch.ones(2))
