"""Training settings: ranges, and a default for every method."""

from __future__ import annotations

import dataclasses

import pytest

from lorac_deploy.lora import METHODS
from lorac_deploy.train_config import DEFAULTS, PEAK_LR, TrainConfig

BAD = {
    "epochs": 0,
    "batch_size": 0,
    "optimizer": "adam",
    "lr": 0.0,
    "momentum": 1.0,
    "weight_decay": -1e-9,
    "warmup": 1.1,
    "clip_norm": -1.0,
    "bn_policy": "train",
    "loss": "hinge",
    "augment": "flip",
    "val_fraction": 1.0,
    "keep": "first",
    "seed": -1,
    "threads": 0,
    "precision": "fp32",
    "focal_gamma": 0.5,
    "distillation_weight": 1.0,
    "temperature": 0.0,
}


def test_the_list_of_bad_values_covers_every_setting() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be used: {name} is '?{BAD[name]}'?, expected"):
        TrainConfig(**{name: BAD[name]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_norm", "momentum", "warmup", "val_fraction"])
def test_numbers_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        TrainConfig(**{name: value})


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(ValueError, match=r"epochs is 0.*; lr is -1.*; augment is 'flip'"):
        TrainConfig(epochs=0, lr=-1.0, augment="flip")  # type: ignore[arg-type]


def test_the_best_epoch_cannot_be_kept_without_validation() -> None:
    with pytest.raises(ValueError, match="keep is 'best', which needs validation images"):
        TrainConfig(val_fraction=0.0)
    assert TrainConfig(val_fraction=0.0, keep="last").val_fraction == 0


def test_every_method_has_defaults_whose_bn_policy_it_goes_with() -> None:
    assert set(DEFAULTS) == set(METHODS)
    assert all(METHODS[name].policy(config.bn_policy) == config.bn_policy for name, config in DEFAULTS.items())
    assert (DEFAULTS["full"].bn_policy, DEFAULTS["lora-c"].bn_policy) == ("batch", "frozen")


def test_the_learning_rate_shown_to_users_is_the_one_used() -> None:
    text = next(f for f in dataclasses.fields(TrainConfig) if f.name == "lr").metadata["help"]
    assert all(f"{value:g} with {optimizer}" in text for optimizer, value in PEAK_LR.items())
