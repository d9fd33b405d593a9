"""Sites: the same layers in PyTorch and in the exported graph, one for every block."""

from __future__ import annotations

import pytest
import torch
from module_networks import NETWORKS, exported, network
from torch import nn

from lorac_deploy.models import ModelSpec, build
from lorac_deploy.structure import describe
from lorac_exporters import inject
from lorac_exporters.canonical import canonicalize
from lorac_exporters.modules.sites import all_sites, blocks_of, channels_in, head_sizes
from lorac_exporters.plan import Layer, LoraConfig, Network

SITES = {
    "residual": ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"],
    "depthwise": ["1.0", "2.0", "3.0"],
    "plain": ["2", "4", "8"],
    "dense": ["0", "3"],
    "signals": ["2"],
}


def names(found: Network) -> list[str]:
    return [layer.name for layer in all_sites(found)]


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_and_the_graph_have_the_same_sites(name: str) -> None:
    given = describe(network(name))
    graph = inject.describe(canonicalize(exported(name)))
    assert names(given) == names(graph) == SITES[name]
    assert [channels_in(layer) for layer in all_sites(given)] == [channels_in(layer) for layer in all_sites(graph)]
    assert head_sizes(given) == head_sizes(graph)


def test_a_resnet20_has_a_site_for_each_of_its_nine_blocks() -> None:
    found = names(describe(build(ModelSpec("resnet20", classes=10))))
    assert found == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]


@pytest.mark.parametrize(
    ("model", "first", "count"),
    [
        ("resnet18", "layer1.0.conv1", 8),
        ("resnet50", "layer1.0.conv1", 16),
        ("mobilenet_v2", "features.1.conv.0.0", 18),
    ],
)
def test_networks_of_the_field_have_a_site_for_each_block(model: str, first: str, count: int) -> None:
    with torch.device("meta"):
        found = names(describe(build(ModelSpec(model, classes=10))))
    assert (found[0], len(found)) == (first, count)


def test_with_fewer_than_three_blocks_every_layer_but_the_stem_is_a_site() -> None:
    with torch.device("meta"):
        vgg = nn.Sequential()
        vgg.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        vgg.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    assert names(describe(vgg)) == ["features.1", "features.2", "classifier.1"]


def test_a_layer_that_cannot_train_is_no_site_and_leaves_its_place_to_the_next() -> None:
    layers = [
        Layer(f"{block}.{conv}", f"{block}.{conv}.weight", None, (4, 4, 3, 3)) for block in "abcd" for conv in "xy"
    ]
    layers[2] = Layer("b.x", "b.x.weight", None, (4, 4, 3, 3), obstacle="its weight is shared with another layer")
    assert names(Network(tuple(layers), ("fc.weight", (2, 4)), None, 0)) == ["a.y", "b.y", "c.x", "d.x"]


def test_a_head_stored_the_other_way_round_is_told_by_its_bias() -> None:
    assert head_sizes(Network((), ("fc.weight", (32, 5)), ("fc.bias", (5,)), 0)) == (5, 32)
    assert head_sizes(Network((), ("fc.weight", (5, 32)), None, 0)) == (5, 32)


def test_blocks_below_a_block_belong_to_it() -> None:
    assert blocks_of(["features.1.conv.0.0", "features.1.conv.1", "features.18.0"]) == [
        "features.1.conv",
        "features.1.conv",
        "features.18",
    ]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        LoraConfig(reduction=0)
