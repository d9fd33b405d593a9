"""Checks before training, and what makes a run the same run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import dataset, network, spec

from lorac_deploy.data import Dataset
from lorac_deploy.lora import LoraConfig
from lorac_deploy.train_checks import identity, require_batches, require_classes, require_fit
from lorac_deploy.train_config import TrainConfig
from lorac_runtime.errors import ConversionError, DataError

DATA = dataset()
CONFIG = TrainConfig()


def who(
    net: nn.Module | None = None,
    *,
    data: Dataset = DATA,
    method: str = "full",
    config: TrainConfig = CONFIG,
    lora: LoraConfig | None = None,
) -> dict[str, str]:
    return identity(net or network(), data, spec(DATA), method=method, config=config, lora=lora or LoraConfig())


def test_the_same_run_has_the_same_identity_on_any_number_of_threads() -> None:
    assert who() == who(config=TrainConfig(threads=3))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"net": network(1)}, {"starting weights"}),
        ({"data": dataset(seed=1)}, {"images"}),
        ({"data": Dataset(DATA.images, (DATA.labels + 1) % 3, DATA.class_names)}, {"images"}),
        ({"data": Dataset(DATA.images, DATA.labels, ("r", "g", "b"))}, {"classes"}),
        ({"method": "head"}, {"method"}),
        ({"config": dataclasses.replace(CONFIG, seed=1, keep="last")}, {"seed", "keep"}),
        ({"lora": LoraConfig(rank=2)}, {"lora_rank"}),
    ],
)
def test_each_difference_shows_under_its_name(change: dict, keys: set[str]) -> None:
    first, second = who(), who(**change)
    assert {key for key in first if first[key] != second[key]} == keys


def test_a_single_changed_weight_shows() -> None:
    net = network()
    with torch.no_grad():
        net[4].running_var[3] += 1e-6
    assert who(net) != who()


def test_a_fitting_network_passes_and_keeps_its_mode() -> None:
    net = network().train()
    require_fit(net, DATA, spec(DATA))
    assert net.training
    assert torch.equal(net[1].running_mean, torch.zeros(8))


class Sixteen(nn.Module):
    """As timm's halo attention: sides it does not take end in an assertion without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-1] % 16 == 0, "")
        return x


def test_a_network_of_other_outputs_or_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="the network has 3 outputs, the data 2 classes"):
        require_fit(network(), Dataset(DATA.images[:2], np.array([0, 1]), ("a", "b")), spec(DATA))
    with pytest.raises(DataError, match=r"are \(3, 8, 8\) .*takes \(3, 8, 9\)"):
        require_fit(network(), DATA, dataclasses.replace(spec(DATA), shape=(3, 8, 9)))
    with pytest.raises(ConversionError, match="cannot process images"):
        require_fit(nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), DATA, spec(DATA))
    with pytest.raises(ConversionError, match=r"cannot process images of \(3, 8, 8\).*AssertionError; another size"):
        require_fit(nn.Sequential(Sixteen(), nn.Flatten()), DATA, spec(DATA))


def test_one_class_is_not_enough() -> None:
    require_classes(DATA)
    with pytest.raises(DataError, match="16 images of 1 class"):
        require_classes(Dataset(DATA.images[:16], np.ones(16, np.int64), DATA.class_names))


def test_batch_statistics_need_two_images() -> None:
    batch = dataclasses.replace(CONFIG, bn_policy="batch")
    require_batches(4, 2, batch)
    require_batches(3, 3, CONFIG)
    with pytest.raises(ValueError, match="3 training images in batches of 32 leave one image alone"):
        require_batches(3, 2, batch)
