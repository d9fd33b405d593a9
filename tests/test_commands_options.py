"""Options come from the settings' fields; every one of them changes the settings."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from lorac_deploy.commands._options import (
    Paragraphs,
    add_device_options,
    add_lora_options,
    add_method_option,
    add_training_options,
    device_defaults,
    either,
    lora_config,
    lora_given,
    names,
    pair,
    refuse_idle_lora_options,
    sizes,
    training_config,
)
from lorac_deploy.train_config import DEFAULTS, TrainConfig
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.manifest import TrainingDefaults

TRAINING = {
    "--epochs": ("7", 7),
    "--batch-size": ("9", 9),
    "--optimizer": ("sgd", "sgd"),
    "--lr": ("0.25", 0.25),
    "--momentum": ("0.5", 0.5),
    "--weight-decay": ("0.1", 0.1),
    "--warmup": ("0.1", 0.1),
    "--clip-norm": ("0", 0.0),
    "--bn": ("recalibrate", "recalibrate"),
    "--loss": ("mse", "mse"),
    "--augment": ("crop", "crop"),
    "--val-fraction": ("0.5", 0.5),
    "--keep": ("last", "last"),
    "--seed": ("3", 3),
    "--threads": ("2", 2),
    "--precision": ("bf16", "bf16"),
    "--focal-gamma": ("3", 3.0),
    "--distillation-weight": ("0.25", 0.25),
    "--temperature": ("4", 4.0),
}
DEVICE = {
    "--lr": (["0.25"], 0.25),
    "--epochs": (["7"], 7),
    "--batch-size": (["9"], 9),
    "--warmup": (["0.1"], 0.1),
    "--loss": (["mse"], "mse"),
    "--label-smoothing": (["0.1"], 0.1),
    "--optimizer": (["sgd"], "sgd"),
    "--weight-decay": (["0.1"], 0.1),
    "--clip-norm": (["0"], 0.0),
    "--momentum": (["0.5"], 0.5),
    "--dampening": (["0.5"], 0.5),
    "--nesterov": ([], True),
    "--betas": (["0.8,0.99"], (0.8, 0.99)),
    "--eps": (["1e-6"], 1e-6),
    "--amsgrad": ([], True),
    "--focal-gamma": (["3"], 3.0),
    "--distillation-weight": (["0.25"], 0.25),
    "--temperature": (["4"], 4.0),
}
LORA = {
    "--rank": (["8"], 8),
    "--alpha": (["1.5"], 1.5),
    "--rank-mode": (["r"], "r"),
    "--layout": (["paper"], "paper"),
    "--learnable-alpha": ([], True),
    "--biases": (["all"], "all"),
    "--small-layers": (["full"], "full"),
    "--freeze-a": ([], True),
    "--linear": ([], True),
    "--share": (["0.5"], 0.5),
    "--reduction": (["8"], 8),
    "--blocks": (["layer3, layer4.0"], ("layer3", "layer4.0")),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    add_training_options(p)
    add_lora_options(p)
    return p


def field(option: str) -> str:
    return "bn_policy" if option == "--bn" else option[2:].replace("-", "_")


def test_the_tables_cover_every_field() -> None:
    assert {field(o) for o in TRAINING} == {f.name for f in dataclasses.fields(TrainConfig)}
    assert {field(o) for o in DEVICE} == {f.name for f in dataclasses.fields(TrainingDefaults)}
    assert {field(o) for o in LORA} | {"seed"} == {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("method", DEFAULTS)
def test_without_options_the_methods_defaults_hold(method: str) -> None:
    args = parser().parse_args([])
    assert training_config(method, args) == DEFAULTS[method]
    assert lora_config(args, 0) == LoraConfig()
    assert lora_given(args) == {}


@pytest.mark.parametrize("option", TRAINING)
@pytest.mark.parametrize("method", ["full", "lora-c"])
def test_each_training_option_sets_its_field_alone(method: str, option: str) -> None:
    text, value = TRAINING[option]
    found = training_config(method, parser().parse_args([option, text]))
    assert found == dataclasses.replace(DEFAULTS[method], **{field(option): value})
    assert found != DEFAULTS[method]


def device_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    add_device_options(p)
    return p


def test_without_options_the_devices_defaults_hold() -> None:
    assert device_defaults("full", device_parser().parse_args([])) == TrainingDefaults()


@pytest.mark.parametrize("option", DEVICE)
def test_each_device_option_sets_its_field_alone(option: str) -> None:
    arguments, value = DEVICE[option]
    found = device_defaults("full", device_parser().parse_args([option, *arguments]))
    assert found == dataclasses.replace(TrainingDefaults(), **{field(option): value}) != TrainingDefaults()


@pytest.mark.parametrize("option", LORA)
def test_each_lora_option_sets_its_field_alone(option: str) -> None:
    arguments, value = LORA[option]
    args = parser().parse_args([option, *arguments])
    assert (
        lora_config(args, 4) == dataclasses.replace(LoraConfig(seed=4), **{field(option): value}) != LoraConfig(seed=4)
    )
    assert lora_given(args) == {field(option): value}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", LORA)
def test_an_option_that_the_method_does_not_heed_is_refused_with_those_that_do(
    method: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    p = parser()
    add_method_option(p, "full")
    args = p.parse_args(["--method", method, option, *LORA[option][0]])
    if field(option) in METHODS[method].options:
        refuse_idle_lora_options(p, args)
        return
    with pytest.raises(SystemExit):
        refuse_idle_lora_options(p, args)
    fitting = [name for name, other in METHODS.items() if field(option) in other.options]
    text = " ".join(capsys.readouterr().err.split())
    assert f"{option} goes with --method {either(fitting)}, not with {method}" in text


def test_the_help_of_the_method_says_what_each_does() -> None:
    p = argparse.ArgumentParser(formatter_class=Paragraphs)
    add_method_option(p, "full")
    lines = [line.strip() for line in p.format_help().splitlines()]
    assert "--method METHOD  what trains (default: full)" in lines
    starts = {line.partition(":")[0] for line in lines}
    assert set(METHODS) <= starts
    text = " ".join(" ".join(lines).split())
    assert all(f"{name}: {method.summary}" in text for name, method in METHODS.items())


def test_help_shows_the_default_that_holds() -> None:
    text = " ".join(parser().format_help().split())
    assert "(default: 10, 5 for full)" in text
    assert f"(default: {TrainConfig().batch_size})" in text
    assert "nominal rank r (default: 4)" in text


@pytest.mark.parametrize("text", ["0", "a", "3,4,5", "-1,4"])
def test_a_wrong_size_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--size", type=sizes)
    with pytest.raises(SystemExit):
        p.parse_args([f"--size={text}"])
    assert f"invalid sizes value: '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.9", "0.9,0.99,1", "a,b", ""])
def test_a_wrong_pair_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--betas", type=pair)
    with pytest.raises(SystemExit):
        p.parse_args([f"--betas={text}"])
    assert f"invalid pair value: '{text}'" in capsys.readouterr().err


def test_names_are_trimmed() -> None:
    assert names(" a b, c") == ("a b", "c")
