"""Blocks by the words front, middle, rear and head: of exported graphs and bare ONNX files, and in training by them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from networks import touch_adapters
from plain_layers import conv, plain
from shared_export import export_graph
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.lora import adapter_tensors, attach, detach, select_trainable
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.structure import describe
from lorac_exporters import inject
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.canonical import canonicalize
from lorac_exporters.memory_plan import choices, late_blocks, read_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.plan import LoraConfig, Network
from lorac_exporters.stages import blocks_of
from lorac_exporters.verify import random_inputs
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ConversionError
from lorac_runtime.manifest import InputSpec, TrainingDefaults

SPEC = InputSpec("input", (3, 16, 16), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("a", "b", "c", "d")


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
