"""Blocks by the words front, middle, rear and head: of PyTorch networks, of exported graphs and of bare ONNX files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import touch_adapters
from torch import nn

from lorac_deploy import _torchvision
from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.lora import adapter_tensors, attach, detach, select_trainable
from lorac_deploy.models import MODELS, ModelSpec, build
from lorac_deploy.structure import describe
from lorac_exporters import inject
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.canonical import canonicalize
from lorac_exporters.memory_plan import choices, late_blocks, read_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.plan import Layer, LoraConfig, Network
from lorac_exporters.stages import blocks_of, resolve
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.verify import random_inputs
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ConversionError
from lorac_runtime.manifest import InputSpec, TrainingDefaults

WORDS = ("front", "middle", "rear", "head")
SPEC = InputSpec("input", (3, 16, 16), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("a", "b", "c", "d")

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


def conv(name: str, size_in: int | tuple[int, ...], size_out: int | tuple[int, ...], kernel: int = 3) -> Layer:
    """Of a square map, or of a signal where sizes are tuples of one."""
    before, after = ((s, s) if isinstance(s, int) else s for s in (size_in, size_out))
    return Layer(name, f"{name}.weight", None, (8, 8, *(kernel,) * len(after)), size_in=before, size_out=after)


def plain(*convs: Layer) -> Network:
    return Network(convs, ("fc.weight", (4, 8)), ("fc.bias", (4,)), 1000)


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


def exported(module: nn.Module, shape: tuple[int, ...]) -> tuple[ir.Model, Network, Network]:
    """The graph, and its facts with BN folded and kept."""
    graph = export_graph(module.eval(), shape)
    folded, kept = canonicalize(graph), canonicalize(graph, fold=False)
    return graph, inject.describe(folded, kept), inject.describe(kept, kept)


class Block(nn.Module):
    """A bottleneck with its stride in the middle, squeeze-and-excitation at its end, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.conv1 = nn.Sequential(nn.Conv2d(c_in, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.conv2 = nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4))
        self.conv3 = nn.Conv2d(4, c_out, 1)
        self.gate = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return torch.relu(self.down(x) + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


class Blocks(nn.Module):
    """Stem, two blocks, a pooled norm, and a hidden fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first, self.second = Block(8, 8, 1), Block(8, 12, 2)
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1)
        self.hidden, self.fc = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        x = self.last(torch.relu(self.norm(nn.functional.max_pool2d(x, 2))))
        return self.fc(torch.relu(self.hidden(torch.relu(x).mean((2, 3)))))


def of(name: str) -> nn.Module:
    return Blocks() if name == "blocks" else build(ModelSpec(name, 4))


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("resnet20", 16), ("mobilenet_v3_small", 32), ("squeezenet1_1", 48))
]


@pytest.mark.parametrize(("name", "size"), [("blocks", 32), *SLOW])
def test_a_network_has_the_same_blocks_in_pytorch_and_in_its_graph(name: str, size: int, tmp_path: Path) -> None:
    module, shape = of(name), (3, size, size)
    graph, folded, kept = exported(module, shape)
    ours = describe(module, bn_policy="batch", input_shape=shape)
    told = blocks_of(ours)
    assert blocks_of(kept) == told
    layers = {layer.name for layer in folded.body} | {n for n, _ in folded.order}
    assert blocks_of(folded) == {word: tuple(n for n in names if n in layers) for word, names in told.items()}
    ir.save(graph, tmp_path / "bare.onnx")
    bare = canonicalize(read_graph(tmp_path / "bare.onnx"))
    assert blocks_of(inject.describe(bare)) == blocks_of(folded)
    for method in ("lora-c", "full", "blocks"):
        for blocks in (("front",), ("middle", "head"), ("rear",)):
            plans = [METHODS[method](n, LoraConfig(rank=1, blocks=blocks)) for n in (kept, ours)]
            weights = [{(t.name, t.shape) for t in plan.trainables if "bias" not in t.role} for plan in plans]
            assert weights[0] == weights[1] != set()


class Staged(nn.Module):
    """Three stages, residual in the second; smooth, so that float32 steps agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.late = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.early(torch.tanh(self.stem(x))))
        x = torch.tanh(self.down(x) + self.shortcut(x))
        return self.fc(torch.tanh(self.late(x)).mean((2, 3)))


@functools.cache
def staged_graph() -> ir.Model:
    return export_graph(Staged().eval(), SPEC.shape)


def artifact(out: Path, method: str, lora: LoraConfig, adapter: Path | None = None, **options: Any) -> Any:
    training = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
    config = ArtifactConfig(lora=lora, method=method, engine="onnxruntime", training=training)
    graph = staged_graph().clone()
    names = options.pop("class_names", NAMES)
    return write_artifact(
        graph, out, name="net", spec=SPEC, class_names=names, config=config, adapter=adapter, **options
    )


LAYERS = {"front": {"stem", "early"}, "middle": {"down", "shortcut"}, "rear": {"late", "fc"}, "head": {"fc"}}


@pytest.mark.parametrize(
    ("method", "blocks"), [("blocks", ("middle",)), ("blocks", ("front", "head")), ("lora-c", ("middle", "rear"))]
)
def test_steps_of_a_device_in_blocks_are_pytorchs(method: str, blocks: tuple[str, ...], tmp_path: Path) -> None:
    """Loss and every tensor after two steps; what lies outside keeps its numbers."""
    net, lora, rate = Staged(), LoraConfig(rank=2, blocks=blocks, small_layers="full"), 0.5
    select_trainable(net, method, lora, input_shape=SPEC.shape)
    touch_adapters(net, size=0.2)
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    manifest = artifact(tmp_path / "artifact", method, lora, tmp_path / "cloud.safetensors").manifest
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    learning = [n for n, p in net.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in learning} == set().union(*(LAYERS[word] for word in blocks))
    assert {t.name for t in manifest.trainables} == set(learning)
    engine = open_engine(tmp_path / "artifact", manifest, engine="onnxruntime")
    images, labels = random_inputs(SPEC, 6, seed=0), np.array([0, 1, 2, 3, 0, 1])
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        assert engine.train_step(inputs_of(engine, images), labels, rate) == pytest.approx(loss.item(), rel=1e-5)
    state = engine.state()
    for name, value in adapter_tensors(net).items():
        np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
        assert (value - start[name]).abs().max() > 1e-4
    assert all(torch.equal(p, start[n]) for n, p in net.named_parameters() if n not in learning)


def inputs_of(engine: Any, images: np.ndarray) -> Any:
    """What a step takes: the images, or the features that a frozen front part makes of them."""
    return engine.inputs(images) if hasattr(engine, "inputs") else images


def test_words_stand_in_reports_and_in_files_and_a_file_is_attached_by_them(tmp_path: Path) -> None:
    net, lora = Staged(), LoraConfig(rank=1, blocks=("rear",), small_layers="full")
    assert attach(net, lora, input_shape=SPEC.shape).config == lora
    save_module_adapter(tmp_path / "a.safetensors", net, model="net")
    other = Staged()
    with pytest.raises(AdapterError, match="input_shape"):
        attach_adapter(tmp_path / "a.safetensors", other)
    report = attach_adapter(tmp_path / "a.safetensors", other, input_shape=SPEC.shape)
    assert report.config.blocks == ("rear",)
    assert {t.name.split(".")[0] for t in report.trainables} == {"late", "fc"}
    detach(other)


def test_a_new_classifier_must_lie_inside_of_the_blocks(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e")
    with pytest.raises(
        ConversionError, match=r"new classifier fc .* blocks in blocks middle .*: add head to the blocks"
    ):
        artifact(tmp_path / "a", "blocks", LoraConfig(blocks=("middle",)), new_head=True, class_names=names)
    assert list(tmp_path.iterdir()) == []
    lora = LoraConfig(blocks=("middle", "head"))
    report = artifact(tmp_path / "a", "blocks", lora, new_head=True, class_names=names)
    assert {t.name for t in report.manifest.trainables} >= {"fc.weight", "down.weight"}


def test_the_memory_plan_offers_late_blocks_by_word_or_else_by_name(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "artifact", "lora-c", LoraConfig(rank=1)).manifest
    network = read_graphs(tmp_path / "artifact", manifest).network
    assert late_blocks(network) == [("middle and rear", ("middle", "rear")), ("rear", ("rear",))]
    assert next(c.options for c in choices(network) if c.label == "rear, A frozen")[-2:] == ("--blocks", "rear")
    same = plain(*(conv(f"b{i}.c", 8, 8) for i in range(4)))
    assert late_blocks(same) == [("b2,b3", ("b2", "b3", "head")), ("b3", ("b3", "head"))]
