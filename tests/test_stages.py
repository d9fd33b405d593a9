"""Blocks by the words front, middle, rear and head: of PyTorch networks and of bare lists of layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_layers import conv, plain
from torch import nn

from lorac_deploy import _torchvision
from lorac_deploy.lora import attach
from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_deploy.structure import describe
from lorac_exporters.plan import Layer, LoraConfig, Network
from lorac_exporters.stages import blocks_of, resolve

WORDS = ("front", "middle", "rear", "head")


# first and last convolution of front, middle and rear
RESNET = ("conv1", "layer1.1.conv2", "layer2.0.conv1", "layer3.1.conv2", "layer4.0.conv1", "layer4.1.conv2")
TABLE = {
    "resnet18": RESNET,
    "resnet50": ("conv1", "layer1.2.conv3", "layer2.0.conv1", "layer3.5.conv3", "layer4.0.conv1", "layer4.2.conv3"),
    "resnet20": ("conv1", "layer1.2.conv2", "layer2.0.conv1", "layer2.2.conv2", "layer3.0.conv1", "layer3.2.conv2"),
    "mobilenet_v2": (
        *("features.0.0", "features.1.conv.1", "features.2.conv.0.0", "features.13.conv.2"),
        *("features.14.conv.0.0", "features.18.0"),
    ),
    "mobilenet_v3_small": (
        *("features.0.0", "features.1.block.2.0", "features.2.block.0.0", "features.8.block.3.0"),
        *("features.9.block.0.0", "features.12.0"),
    ),
    "densenet121": (
        *("features.conv0", "features.transition1.conv"),
        *("features.denseblock2.denselayer1.conv1", "features.transition3.conv"),
        *("features.denseblock4.denselayer1.conv1", "features.denseblock4.denselayer16.conv2"),
    ),
    "squeezenet1_1": (
        *("features.0", "features.4.expand3x3", "features.6.squeeze", "features.7.expand3x3"),
        *("features.9.squeeze", "features.12.expand3x3"),
    ),
    "vgg11": ("features.0", "features.3", "features.6", "features.13", "features.16", "features.18"),
    "efficientnet_b0": (
        *("features.0.0", "features.1.0.block.2.0", "features.2.0.block.0.0", "features.5.2.block.3.0"),
        *("features.6.0.block.0.0", "features.8.0"),
    ),
    "shufflenet_v2_x0_5": (
        *("conv1.0", "stage2.3.branch2.5", "stage3.0.branch1.0", "stage3.7.branch2.5"),
        *("stage4.0.branch1.0", "conv5.0"),
    ),
    "googlenet": (
        *("conv1.conv", "conv3.conv", "inception3a.branch1.conv", "inception4e.branch4.1.conv"),
        *("inception5a.branch1.conv", "inception5b.branch4.1.conv"),
    ),
}


@functools.cache
def facts(name: str, size: int = 64) -> Network:
    """Of a PyTorch network without numbers."""
    with torch.device("meta"):
        options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
        module = (
            build(ModelSpec(name, 7))
            if name in MODELS
            else _torchvision.models.get_model(name, weights=None, num_classes=7, **options)
        )
        return describe(module, input_shape=(3, size, size))


@pytest.mark.parametrize("name", TABLE)
def test_the_blocks_of_known_networks(name: str) -> None:
    network = facts(name)
    told, convs = blocks_of(network), {conv.name for conv in network.convs}
    assert tuple(told) == WORDS
    found = [[layer for layer in told[word] if layer in convs] for word in WORDS[:3]]
    assert tuple(layer for part in found for layer in (part[0], part[-1])) == TABLE[name]
    assert told["head"] == (network.head,)
    assert told["rear"][-1] == network.head
    everything = [layer for word in WORDS[:3] for layer in told[word]]
    assert len(everything) == len(set(everything))
    called = {name for name, _ in network.order} | {network.head}
    assert set(everything) == called  # every layer that the network calls lies in one block


def test_hidden_fully_connected_layers_behind_pooling_are_in_the_rear() -> None:
    assert blocks_of(facts("vgg11"))["rear"][-3:] == ("classifier.0", "classifier.3", "classifier.6")


def test_a_network_of_two_stages_has_no_middle() -> None:
    network = facts("alexnet")
    told = blocks_of(network)
    assert tuple(told) == ("front", "rear", "head")
    assert told["front"] == ("features.0", "features.3")
    with pytest.raises(
        ValueError, match=r"blocks middle: .* two stages, front \(features\) and rear \(features, class"
    ):
        resolve(network, ("middle",))


def parts(*convs: Layer) -> list[str]:
    """The layers of front, middle and rear, each as one text."""
    told = blocks_of(plain(*convs))
    return [" ".join(told.get(word, ())) for word in WORDS[:3]]


def test_squeeze_and_excitation_belongs_to_the_stage_around_it_also_at_the_end_of_a_block() -> None:
    body = [conv("a", 32, 32), conv("b", 32, 32), conv("squeeze", 1, 1, 1), conv("excite", 1, 1, 1)]
    body += [conv("c", 32, 16), conv("s", 1, 1, 1), conv("d", 16, 16), conv("e", 16, 8), conv("last", 1, 1, 1)]
    assert parts(*body) == ["a b squeeze excite", "c s d", "e last fc"]


def test_a_stage_of_single_points_is_one_where_a_stride_makes_it() -> None:
    convs = [conv("a", 8, 8), conv("b", 8, 4), conv("c", 4, 2), conv("d", 2, 1), conv("e", 1, 1)]
    assert parts(*convs) == ["a b", "c", "d e fc"]


def test_a_convolution_over_the_whole_map_is_none() -> None:
    assert parts(conv("a", 16, 16), conv("b", 16, 8), conv("c", 8, 4), conv("d", 4, 1, 4)) == ["a b", "", "c d fc"]


def test_convolutions_without_padding_end_no_stage() -> None:
    convs = [conv("a", 28, 26), conv("b", 26, 24), conv("c", 24, 22), conv("d", 11, 9), conv("e", 9, 7)]
    assert parts(*convs, conv("f", 3, 3)) == ["a b c", "d e", "f fc"]


def test_signals_have_stages_along_time() -> None:
    sizes = [((64,), (32,)), ((32,), (16,)), ((16,), (8,)), ((8,), (4,))]
    assert parts(*(conv(f"c{i}", *size) for i, size in enumerate(sizes))) == ["c0 c1", "c2", "c3 fc"]


def test_an_expansion_goes_with_the_strided_convolution_of_its_block() -> None:
    convs = [conv("stem", 32, 32), conv("x.1.a", 32, 32), conv("x.2.a", 32, 32, 1), conv("x.2.b", 32, 16)]
    convs += [conv("x.2.c", 16, 16, 1), conv("x.3.a", 16, 8)]
    assert parts(*convs) == ["stem x.1.a", "x.2.a x.2.b x.2.c", "x.3.a fc"]
    nameless = [Layer(f"n{i}", "w", None, c.shape, size_in=c.size_in, size_out=c.size_out) for i, c in enumerate(convs)]
    assert parts(*nameless) == ["n0 n1 n2", "n3 n4", "n5 fc"]


@pytest.mark.parametrize(
    ("convs", "text"),
    [
        ([("a", 8, 8), ("b", 8, 8)], "every convolution gives 8x8 .*: name layers instead; there are a, b, and head"),
        ([("a", 8, 8), ("b", 8, 4), ("c", 4, 2), ("d", 8, 8)], "d gives 8x8 after c gave 2x2"),
        ([("a", 8, 8), ("b", 8, 4), ("c", 8, 8)], "feature maps grow again"),
        ([("a", 8, 8), ("b", 8, 4), ("c", 4, 2), ("d", 8, 8), ("e", 4, 2)], "d gives 8x8 after c gave 2x2"),
        ([], "this network has none before its head"),
    ],
)
def test_where_no_stages_can_be_told_the_words_are_refused_but_for_the_head(convs: list[Any], text: str) -> None:
    network = plain(*(conv(*each) for each in convs))
    for word in WORDS[:3]:
        with pytest.raises(ValueError, match=text):
            resolve(network, (word,))
    assert resolve(network, ("head", "a")) == ("fc", "a")


def test_unknown_sizes_are_named_with_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"that of conv1 is unknown: give the shape .*input_shape"):
        attach(build(ModelSpec("resnet20", 4)), LoraConfig(blocks=("front",)))


def test_words_win_over_layers_of_their_names() -> None:
    network = plain(conv("head", 16, 16), conv("rear", 16, 8), conv("front", 8, 4))
    assert resolve(network, ("head",)) == ("fc",)
    assert resolve(network, ("rear",)) == ("front", "fc")


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=3, max_size=6))
def test_blocks_part_the_layers_of_any_network_whose_maps_shrink(stages: list[tuple[int, bool]]) -> None:
    """Of stages with some convolutions each, and squeeze-and-excitation in some of them."""
    size, convs, expected = 64, [], []
    for number, (count, squeezed) in enumerate(stages):
        names = [f"s{number}.c{i}" for i in range(count)]
        convs += [conv(name, size if i else 2 * size, size) for i, name in enumerate(names)]
        if squeezed:
            convs.append(conv(f"s{number}.se", 1, 1, 1))
        expected.append([*names, *([f"s{number}.se"] if squeezed else [])])
        size //= 2
    first = 0 if stages[0][0] + stages[0][1] > 1 else 1
    told = blocks_of(plain(*convs))
    assert told["front"] == tuple(name for stage in expected[: first + 1] for name in stage)
    assert told["rear"] == (*expected[-1], "fc")
    assert sum(map(len, (told["front"], told.get("middle", ()), told["rear"]))) == len(convs) + 1


class Backwards(nn.Module):
    """Defines its layers in another order than it calls them; some are never called, some have numbers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Conv2d(3, 3, 1)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(nn.functional.max_pool2d(torch.tanh(self.second(self.first(x) * self.scale)), 2))
        return self.fc(torch.tanh(self.last(x)).mean((2, 3)))


def test_stages_follow_the_order_of_calls_and_a_norm_behind_pooling_its_size() -> None:
    network = describe(Backwards(), bn_policy="batch", input_shape=(3, 16, 16))
    told = blocks_of(network)
    assert told["front"] == ("scale", "first", "second")
    assert told["rear"] == ("norm", "last.0", "last.1", "fc")
    assert "idle" not in [layer for word in told for layer in told[word]]


def test_finding_sizes_changes_nothing_of_the_network() -> None:
    """Training mode with batch normalisation of single points would fail on one sample, and move statistics."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
    module.extend([nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)])
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    describe(module, input_shape=(3, 4, 4))
    assert [part.training for part in module] == [True, False, *[True] * 7]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"cannot process a sample of shape \(1, 4, 4\)"):
        describe(module, input_shape=(1, 4, 4))
    assert module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
