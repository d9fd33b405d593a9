"""The CIFAR ResNets with option-A shortcuts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorac_deploy.cifar_resnets import CifarBlock, CifarResNet
from lorac_deploy.models import ModelSpec, build, load_weights
from lorac_exporters.canonical import canonicalize
from lorac_exporters.preflight import untrainable
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.training_ort import ENGINE

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_sizes_are_those_of_the_published_table(depth: int, millions: float) -> None:
    """He et al., table 6; 110 layers are given there with two digits."""
    with torch.device("meta"):
        net = build(ModelSpec(f"resnet{depth}", classes=10))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) + 1 == depth


def test_a_shortcut_takes_every_second_pixel_and_pads_new_channels_with_zeros() -> None:
    block = CifarBlock(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]]
    assert torch.equal(block(x), expected)


def test_a_block_of_equal_widths_adds_its_input() -> None:
    block = CifarBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_resolution_halves_at_the_second_and_third_stage() -> None:
    net, sizes = CifarResNet(1, 10), []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 3, 32, 32))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_its_graph_is_made_of_operators_that_can_be_trained() -> None:
    graph = canonicalize(export_graph(build(ModelSpec("resnet20", classes=10)), (3, 32, 32))).model
    assert {node.op_type for node in graph.graph} >= {"Conv", "Slice", "Pad"}
    assert untrainable(graph, ["conv1.weight"], engine=ENGINE) == ()


@pytest.fixture(scope="module")
def official(realdata: Path) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """The 1,000 official test images, normalised, and their labels."""
    spec = importlib.util.spec_from_file_location("load_data", realdata / "load_data.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    images, labels = reader.cifar10_full(realdata / "cifar10_lossless.npz")
    normalised = (images[-1000:] / 255 - MEAN) / STD
    return torch.from_numpy(normalised.astype(np.float32)).permute(0, 3, 1, 2), labels[-1000:]


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.915), (56, 0.926)])
def test_published_weights_reach_their_accuracy_on_the_official_test_images(
    realdata: Path, official: tuple[Tensor, np.ndarray[Any, Any]], depth: int, accuracy: float
) -> None:
    net = build(ModelSpec(f"resnet{depth}", classes=10)).eval()
    report = load_weights(net, realdata / "weights" / f"resnet{depth}_cifar10_akamaster.safetensors")
    assert report.fresh == ()
    images, labels = official
    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in images.split(250)]).numpy()
    assert (predicted == labels).mean() == pytest.approx(accuracy, abs=0.0005)
