"""How many parameters LoRA-C trains: the paper's counts, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_network import SMALL, tiny
from torch import nn

from lorac_deploy.lora import LoraConfig, attach, report_of
from lorac_deploy.models import ModelSpec, build

# Millions of trainable parameters of LoRA-C (arXiv 2410.16954), 10 classes, 3x3 stem, for r = 1, 2, 4, 8, 16, 32, 64
PUBLISHED = {
    ("resnet18", "rk"): (0.073, 0.140, 0.273, 0.538, 1.070, 2.133, 4.258),
    ("resnet18", "r"): (0.030, 0.053, 0.099, 0.191, 0.375, 0.744, 1.481),
    ("resnet34", "rk"): (0.140, 0.273, 0.540, 1.073, 2.139, 4.271, 8.535),
    ("resnet50", "r"): (0.086, 0.150, 0.279, 0.535, 1.048, 2.074, 4.126),
    ("resnet101", "r"): (0.156, 0.290, 0.557, 1.092, 2.162, 4.303, 8.583),
}
MODEL_MILLIONS = {"resnet18": 11.17, "resnet34": 21.28, "resnet50": 23.52, "resnet101": 42.51}
CASES = [(name, mode, 2**i, m) for (name, mode), row in PUBLISHED.items() for i, m in enumerate(row)]


def formula(name: str, rank_mode: str, r: int) -> int:
    """(c_out + c_in) * k * rank over all convolutions but the stem, plus stem and head: the paper's own count."""
    with torch.device("meta"):
        net: Any = build(ModelSpec(name, classes=10, cifar_stem=True))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.conv1]
    k_times_rank = [(m, m.kernel_size[0], r * m.kernel_size[0] if rank_mode == "rk" else r) for m in convs]
    adapters = sum((m.in_channels + m.out_channels) * k * rank for m, k, rank in k_times_rank)
    return adapters + 64 * 3 * 3 * 3 + net.fc.in_features * 10


@pytest.mark.parametrize(("name", "mode", "r", "millions"), CASES)
def test_trained_parameters_equal_the_published_count(name: str, mode: Any, r: int, millions: float) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        report = attach(net, LoraConfig(rank=r, rank_mode=mode, small_layers="adapter"))
    assert report.trained_parameters == formula(name, mode, r)
    assert report.trained_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert report.trained_parameters / 1e6 == pytest.approx(millions, abs=5.01e-4)
    assert report.model_parameters / 1e6 == pytest.approx(MODEL_MILLIONS[name], abs=5e-3)
    assert report.frozen == ()


@pytest.mark.parametrize(("name", "mode", "r", "millions"), [c for c in CASES if c[2] <= 16])
def test_the_default_gives_the_published_count_where_every_adapter_is_smaller(
    name: str, mode: Any, r: int, millions: float
) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        assert attach(net, LoraConfig(rank=r)).trained_parameters == formula(name, report_of(net).rank_mode, r)


@pytest.mark.parametrize(
    ("name", "mode"), [("resnet18", "rk"), ("resnet34", "rk"), ("resnet50", "r"), ("mobilenet_v2", "rk")]
)
def test_rank_mode_auto_follows_the_size_of_the_backbone(name: str, mode: str) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        assert attach(net, LoraConfig()).rank_mode == mode


def test_at_r_64_layers_whose_adapter_is_not_smaller_stay_frozen_and_are_named() -> None:
    with torch.device("meta"):
        report = attach(build(ModelSpec("resnet18", classes=10, cifar_stem=True)), LoraConfig(rank=64))
    assert [name for name, _ in report.frozen] == [
        *(f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2)),
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv1",
        "layer2.1.conv2",
    ]


def test_the_report_says_in_one_line_what_trains() -> None:
    report = attach(tiny(), SMALL)
    assert str(report) == (
        "lora-c: 464 trained of 1,109 parameters (41.84 %); 2 adapted layers, 2 tensors in full, 1 layers frozen"
    )


def counted(config: LoraConfig) -> int:
    """Trained parameters of a ResNet-18 with a small stem, by the report and by PyTorch alike."""
    with torch.device("meta"):
        net = build(ModelSpec("resnet18", classes=10, cifar_stem=True))
        report = attach(net, config)
    assert report.trained_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    return report.trained_parameters


def test_with_a_frozen_a_only_the_b_factors_stem_and_head_are_counted() -> None:
    with torch.device("meta"):
        net: Any = build(ModelSpec("resnet18", classes=10, cifar_stem=True))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.conv1]
    b_factors = sum(m.out_channels * m.kernel_size[0] * 4 * m.kernel_size[1] for m in convs)
    assert counted(LoraConfig(rank=4, freeze_a=True)) == b_factors + 64 * 27 + 5120
    assert counted(LoraConfig(rank=4)) > counted(LoraConfig(rank=4, freeze_a=True))


def test_of_a_block_its_factors_are_counted_and_the_head_where_it_is_one() -> None:
    layer4 = (
        (512 + 256) * 9 * 4 + 3 * (512 + 512) * 9 * 4 + (512 + 256) * 4
    )  # convolutions, and the 1x1 of the shortcut
    assert counted(LoraConfig(rank=4, blocks=("layer4",))) == layer4
    assert counted(LoraConfig(rank=4, blocks=("layer4", "fc", "conv1"))) == layer4 + 5120 + 64 * 27


def test_the_report_says_what_of_the_adapters_is_frozen_and_which_layers_are_outside() -> None:
    report = attach(tiny(), LoraConfig(rank=1, freeze_a=True, blocks=("2", "4")))
    assert str(report) == (
        "lora-c: 72 trained of 1,109 parameters (6.49 %); 1 adapted layers, 0 tensors in full, 4 layers frozen; "
        "lora_a frozen, 72 parameters"
    )
    assert report.frozen == (
        ("0", "outside of the trained blocks"),
        ("4", "its adapter would not be smaller than its weight"),
        ("5", "outside of the trained blocks"),
        ("8", "outside of the trained blocks"),
    )
