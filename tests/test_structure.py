"""Stem, convolutions and head of PyTorch networks."""

from __future__ import annotations

import pytest
import torch
from shared_export import export_graph
from torch import nn
from torch.nn.utils import parametrizations

from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_deploy.structure import describe, find_head
from lorac_exporters import inject
from lorac_exporters.canonical import canonicalize
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig


class OwnConv(nn.Conv2d):
    """A subclass of nn.Conv2d."""


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("resnet18", "conv1", "fc"),
        ("resnet20", "conv1", "linear"),
        ("mobilenet_v2", "features.0.0", "classifier.1"),
        ("mobilenet_v3_small", "features.0.0", "classifier.3"),
        ("densenet121", "features.conv0", "classifier"),
        ("squeezenet1_1", "features.0", "classifier.1"),
    ],
)
def test_stem_and_head_of_known_networks_are_found(name: str, stem: str, head: str) -> None:
    with torch.device("meta"):
        network = describe(build(ModelSpec(name, classes=7)))
    assert network.convs[0].name == stem
    assert network.head_weight[0] == f"{head}.weight"
    assert network.head_weight[1][0] == 7


@pytest.mark.parametrize("name", MODELS)
def test_backbone_and_head_together_are_the_whole_network(name: str) -> None:
    with torch.device("meta"):
        module = build(ModelSpec(name, classes=7, task="segmentation" if MODELS[name].dense else "classification"))
    network = describe(module)
    head = sum(torch.Size(shape).numel() for _, shape in (network.head_weight, network.head_bias or ("", (0,))))
    head += sum(torch.Size(layer.shape).numel() + layer.shape[0] for layer in network.more_heads)
    assert network.backbone_parameters + head == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v3_small", "densenet121", "squeezenet1_1"])
def test_convolutions_are_called_in_the_order_that_makes_the_first_one_the_stem(name: str) -> None:
    module, order = build(ModelSpec(name, classes=2)).eval(), []
    for layer, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda *_, layer=layer: order.append(layer))
    module(torch.zeros(1, 3, 64, 64))
    assert order[0] == describe(module).convs[0].name


def test_stem_and_head_can_be_named() -> None:
    module = nn.ModuleDict({"late": nn.Conv2d(8, 8, 3), "first": nn.Conv2d(3, 8, 3), "a": nn.Linear(8, 4)})
    module["b"] = nn.Linear(8, 2)
    found = describe(module, stem="first", head="a")
    assert [c.name for c in found.convs] == ["first", "late"]
    assert found.head_weight[0] == "a.weight"
    assert [(layer.name, layer.weight, layer.bias) for layer in found.linears] == [("b", "b.weight", "b.bias")]
    assert describe(module).convs[0].name == "late"


def test_a_stem_that_is_no_convolution_is_refused_with_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"stem '3' is not a convolution of this network: candidates are 0"):
        describe(net(), stem="3")
    with pytest.raises(ValueError, match=r"head '0' is not a linear layer or 1x1 convolution: candidates are 2"):
        describe(net(), head="0")


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="ends neither in a linear layer nor in a 1x1 convolution"):
        find_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    with pytest.raises(ValueError, match="ends neither"):  # a 1x1 convolution that is not the last one
        find_head(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)))
    with pytest.raises(ValueError, match="ends neither"):
        find_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8)))


def test_a_head_that_shares_its_weight_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8))
    module[2].weight = module[1].weight
    with pytest.raises(ValueError, match="the weight of head '2' is shared"):
        describe(module)


def obstacles(module: nn.Module) -> dict[str, str | None]:
    return {c.name: c.obstacle for c in describe(module).convs}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 2), "transposed convolutions take no adapter"),
        (nn.Conv3d(8, 8, 3), "Conv3d takes no adapter, only plain nn.Conv1d and nn.Conv2d do"),
        (OwnConv(8, 8, 3), "OwnConv takes no adapter, only plain nn.Conv1d and nn.Conv2d do"),
        (parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "its weight is computed by a parametrization or hook"),
        (nn.Conv2d(8, 8, 3), None),
        (nn.Conv1d(8, 8, 3), None),
    ],
)
def test_convolutions_that_take_no_adapter_are_named_with_the_reason(layer: nn.Module, reason: str | None) -> None:
    assert obstacles(net(layer)) == {"0": None, "1": reason}


def test_convolutions_that_share_a_weight_are_obstacles_even_as_the_stem() -> None:
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.weight = first.weight
    assert obstacles(nn.Sequential(first, second, nn.Linear(3, 2))) == {
        "0": "its weight is shared with 1",
        "1": "its weight is shared with 0",
    }


def test_a_stem_of_any_kind_can_train() -> None:
    assert obstacles(nn.Sequential(OwnConv(3, 8, 3), nn.Linear(8, 2))) == {"0": None}
    assert obstacles(nn.Sequential(nn.Conv3d(3, 8, 3), nn.Linear(8, 2))) == {"0": None}


def test_batch_normalisation_counts_as_trainable_only_under_batch() -> None:
    module = net(nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False))
    assert describe(module, bn_policy="frozen").batchnorms == ()
    assert describe(module, bn_policy="recalibrate").batchnorms == ()
    assert describe(module, bn_policy="batch").batchnorms == (("1.weight", "1.bias", 8),)
    assert describe(module).others == ()


def test_parameters_of_other_layers_are_listed() -> None:
    found = describe(net(nn.PReLU(), nn.GroupNorm(2, 8)))
    assert [(t.name, t.role) for t in found.others] == [
        ("1.weight", "weight"),
        ("2.weight", "weight"),
        ("2.bias", "bias"),
    ]


RANK_1 = LoraConfig(rank=1)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora-c", RANK_1),
        ("head", RANK_1),
        ("lora-c", LoraConfig(rank=1, freeze_a=True)),
        ("lora-c", LoraConfig(rank=1, blocks=("0", "4"))),
        ("lora-c", LoraConfig(rank=1, blocks=("2", "8"), freeze_a=True, learnable_alpha=True)),
    ],
)
def test_the_plan_is_the_one_made_from_the_exported_graph(method: str, config: LoraConfig) -> None:
    """Two routes to what trains: the module's own facts, and those of its ONNX graph."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, (1, 3)), nn.Conv2d(16, 8, 1)]
    module = net(*layers, nn.AdaptiveAvgPool2d(1)).eval()
    graph = export_graph(module, (3, 16, 16))
    exported = inject.describe(canonicalize(graph), canonicalize(graph, fold=False))
    ours, theirs = (METHODS[method](facts, config) for facts in (describe(module), exported))
    assert ours == theirs
    assert describe(module).backbone_parameters == exported.backbone_parameters


@pytest.mark.parametrize("blocks", [("features.11.block.2", "classifier"), ("features.0", "features.4.block")])
def test_full_training_of_blocks_takes_the_same_layers_of_the_module_and_of_its_graph(blocks: tuple[str, ...]) -> None:
    module = build(ModelSpec("mobilenet_v3_small", classes=4)).eval()
    graph = export_graph(module, (3, 32, 32))
    exported = inject.describe(canonicalize(graph), canonicalize(graph, fold=False))
    ours, theirs = (METHODS["full"](facts, LoraConfig(blocks=blocks)) for facts in (describe(module), exported))
    weights = [[t for t in plan.trainables if t.role == "weight"] for plan in (ours, theirs)]
    assert weights[0] == weights[1]
    assert 2 <= len(weights[0]) < 10
    assert ours.frozen == theirs.frozen
    messages = []
    for facts in (describe(module), exported):
        with pytest.raises(ValueError, match=r"features\.4\.bloc") as error:
            METHODS["full"](facts, LoraConfig(blocks=("features.4.bloc",)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
