"""Networks that are no classifiers: the same plan in PyTorch and in ONNX, the same heads, drop-in files, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from shared_export import export_graph
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.data import Dataset
from lorac_deploy.losses import loss_of
from lorac_deploy.segmentation_nets import segmentation_net
from lorac_deploy.structure import describe
from lorac_deploy.task_evaluation import evaluate_task
from lorac_deploy.train_config import TrainConfig
from lorac_exporters.canonical import canonicalize
from lorac_exporters.graphs import build_graphs
from lorac_exporters.inject import describe as described
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.running import run
from lorac_exporters.task_config import TaskConfig
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.tasks import IGNORED

SPEC = InputSpec("input", (3, 32, 32), 1 / 255, (0.5,) * 3, (0.25,) * 3)
LORA = LoraConfig(rank=2)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = segmentation_net(name, 3).eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.running_mean, std=0.1)
    return net


@pytest.mark.parametrize("name", ["unet_small", "lraspp_mobilenet_v3_large"])
def test_pytorch_and_onnx_plan_the_same(name: str) -> None:
    net = network(name)
    graph = export_graph(net, SPEC.shape)
    graphs = build_graphs(
        graph,
        spec=SPEC,
        classes=3,
        new_head=False,
        method="lora-c",
        lora=LORA,
        policy="frozen",
        task=TaskConfig("segmentation"),
    )
    plan = METHODS["lora-c"](describe(net, input_shape=SPEC.shape), LORA)
    assert {t.name: t for t in plan.trainables} == {t.name: t for t in graphs.plan.trainables}
    assert {a.layer: a for a in plan.adapters} == {a.layer: a for a in graphs.plan.adapters}
    assert graphs.network.backbone_parameters == describe(net).backbone_parameters
    x = np.random.default_rng(0).standard_normal((3, *SPEC.shape)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(graphs.base.model, x), expected, atol=1e-4 * np.abs(expected).max())
    assert not [node for node in graphs.base.model.graph if node.op_type == "Shape"]


def test_two_layers_whose_sum_is_the_answer_are_both_heads() -> None:
    net = network("lraspp_mobilenet_v3_large")
    heads = {"classifier.low_classifier", "classifier.high_classifier"}
    found = described(canonicalize(export_graph(net, SPEC.shape), head=False), classifier=False)
    for facts in (found, describe(net)):
        assert set(facts.heads) == heads
        assert not heads & {layer.name for layer in facts.body}
    for method in ("head", "full", "lora-all"):
        plans = [METHODS[method](facts, LORA) for facts in (found, describe(net))]
        names = [{t.name for t in plan.trainables} for plan in plans]
        assert all(any(n.startswith(head) for n in names[0]) for head in heads), method
    assert {t.name for t in METHODS["head"](found, LORA).trainables} == {
        f"{h}.{p}" for h in heads for p in ("weight", "bias")
    }


class Odd(nn.Module):
    """Outputs that no loss can use: one whose size depends on values, and indices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).argmax(1)


def test_outputs_that_cannot_be_trained_are_named() -> None:
    with pytest.raises(ConversionError, match=r"(?s)without what picks boxes.*'logits' is int64.*ArgMax"):
        build_graphs(
            export_graph(Odd().eval(), SPEC.shape),
            spec=SPEC,
            classes=0,
            new_head=False,
            method="lora-c",
            lora=LORA,
            policy="frozen",
            task=TaskConfig("regression"),
        )


def test_a_classifier_is_no_segmentation_network() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(ConversionError, match=r"expected scores of two classes or more, \(batch, classes, height"):
        build_graphs(
            export_graph(net, SPEC.shape),
            spec=SPEC,
            classes=3,
            new_head=False,
            method="lora-c",
            lora=LORA,
            policy="frozen",
            task=TaskConfig("segmentation"),
        )


def masks() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 8, 8))
    labels[0, :3] = IGNORED
    return torch.from_numpy(rng.standard_normal((2, 3, 8, 8))), torch.from_numpy(labels)


def test_losses_in_pytorch_leave_out_what_has_no_label() -> None:
    scores, labels = masks()
    kept = labels != IGNORED
    chosen, truth = scores.movedim(1, -1)[kept], labels[kept]
    entropy = functional.cross_entropy(chosen, truth)
    assert loss_of(TrainConfig(), "segmentation")(scores, labels, None) == pytest.approx(entropy.item())
    surprise = functional.cross_entropy(chosen, truth, reduction="none")
    weighted = ((1 - torch.exp(-surprise)) ** 3 * surprise).mean().item()
    config = TrainConfig(loss="focal", focal_gamma=3.0)
    assert loss_of(config, "segmentation")(scores, labels, None) == pytest.approx(weighted)
    nothing = torch.full_like(labels, IGNORED)
    assert loss_of(config, "segmentation")(scores, nothing, None) == 0
    classes = torch.tensor([255, 3])
    logits = torch.zeros(2, 300, dtype=torch.float64)
    assert loss_of(TrainConfig(loss="focal", focal_gamma=0.0), "classification")(
        logits, classes, None
    ) == pytest.approx(np.log(300))


def test_a_network_that_equals_its_base_has_nothing_to_learn_from_it() -> None:
    scores, labels = masks()
    scores.requires_grad_()
    nothing = torch.full_like(labels, IGNORED)
    loss = loss_of(TrainConfig(loss="distillation"), "segmentation")(scores, nothing, scores.detach())
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max().item() < 1e-12


def test_evaluation_is_over_labelled_pixels() -> None:
    _, labels = masks()
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[..., 0] = np.where(labels.numpy() == 1, 255, 0)

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(x[:, 0]), 9 * x[:, 0], torch.full_like(x[:, 0], -9)], 1)

    spec = InputSpec("input", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.5,) * 3)
    loss, overlap = evaluate_task(First(), Dataset(images, labels.numpy(), ("a", "b", "c")), spec)
    truth = labels[labels != IGNORED].numpy()
    answers = np.where(truth == 1, 1, 0)
    shares = [((truth == c) & (answers == c)).sum() / ((truth == c) | (answers == c)).sum() for c in range(3)]
    assert overlap == pytest.approx(np.mean(shares))
    assert loss > 0


def test_the_names_of_a_model_may_not_be_those_of_targets(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 18]> g (float[n,2,30,30] logits, float[n,1] taken) => (float loss)
    { loss = ReduceMean <keepdims = 0> (logits) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.input[1].name = "bias"
    onnx.save(proto, tmp_path / "loss.onnx")

    graph: ir.Model = export_graph(nn.Conv2d(3, 2, 3).eval(), SPEC.shape)
    with pytest.raises(ConversionError, match=r"'bias' has a name that is taken"):
        build_graphs(
            graph,
            spec=SPEC,
            classes=0,
            new_head=False,
            method="lora-c",
            lora=dataclasses.replace(LORA),
            policy="frozen",
            task=TaskConfig("custom", tmp_path / "loss.onnx"),
        )
