"""Gates over channels and positions: their formula, and the same losses, gradients and steps in both programs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from exporter_graphs import from_text, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from module_networks import (
    CLASSES,
    NETWORKS,
    Residual,
    batches,
    close,
    gradients,
    graphs_of,
    network,
    prepared,
    samples,
    sides,
    with_numbers,
)
from step_runs import Case, distances, in_pytorch
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.lora import LoraConfig, select_trainable
from lorac_exporters.graphs import build_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import Layer, Network
from lorac_runtime.manifest import BnPolicy, InputSpec, TrainingDefaults

LORA = LoraConfig(reduction=2)
SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, weight_decay=0.01, clip_norm=0.5)
ADAMW = TrainingDefaults(weight_decay=0.01)
STEPPED = [("frozen", "residual"), ("frozen", "dense"), ("batch", "residual")]


def case(training: TrainingDefaults = ADAMW, policy: BnPolicy = "frozen", lora: LoraConfig = LORA) -> Case:
    return Case(training, policy, lora, "attention")


def gated(x: Tensor, tensors: dict[str, Tensor], layer: str) -> Tensor:
    """Written anew, with sums instead of convolutions: x (N, C, ...)."""
    down, down_bias, up, up_bias = (tensors[f"{layer}.gate_{n}"] for n in ("down", "down_bias", "up", "up_bias"))
    mean = x.flatten(2).mean(2) if x.ndim > 2 else x
    channels = 2 / (1 + torch.exp(-((mean @ down.T + down_bias).clamp(min=0) @ up.T + up_bias)))
    result = x * channels.reshape(*channels.shape, *[1] * (x.ndim - 2))
    if f"{layer}.gate_space" in tensors:
        logits = torch.einsum("nc...,c->n...", x, tensors[f"{layer}.gate_space"].flatten())
        result = result * (2 / (1 + torch.exp(-logits - tensors[f"{layer}.gate_space_bias"]))).unsqueeze(1)
    return result


def test_gates_act_on_the_input_of_their_layer_alone() -> None:
    net = prepared("residual", case()).eval()
    assert isinstance(net, Residual)
    tensors = dict(net.named_parameters())
    x = torch.from_numpy(samples("residual", 3)[0])
    with torch.no_grad():
        plain = copy.deepcopy(network("residual"))
        plain.fc.load_state_dict({"weight": net.fc.weight, "bias": net.fc.bias})
        x_in = torch.tanh(plain.bn1(plain.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            block = getattr(plain, name)[0]
            inner = torch.tanh(block.bn1(block.conv1(gated(x_in, tensors, f"{name}.0.conv1"))))
            x_in = torch.tanh(block.bn2(block.conv2(inner)) + block.downsample(x_in))
        expected = plain.fc(gated(x_in.mean((2, 3)), tensors, "fc"))
        assert torch.allclose(net(x), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [*((name, 3) for name in NETWORKS), ("residual", 1), ("dense", 1)])
def test_every_gradient_is_pytorchs(name: str, count: int) -> None:
    found, exact = gradients(name, case(), count)
    assert all(value.any() for value in exact.values())
    assert close(found, exact)


def test_batch_statistics_give_pytorchs_gradients() -> None:
    assert close(*gradients("residual", case(policy="batch"), 3))


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("policy", "name"), STEPPED)
def test_three_steps_and_evaluation_are_pytorchs(name: str, policy: BnPolicy, training: TrainingDefaults) -> None:
    both = sides(name, case(training, policy))
    data = batches(name, 3, steps=3, lr=0.02)
    values, labels = samples(name, 4, seed=9)
    evaluated = both.graph.logits(values, labels)
    with torch.no_grad():
        logits = copy.deepcopy(both.net).eval()(torch.from_numpy(values))
    np.testing.assert_allclose(evaluated["logits"], logits.numpy(), atol=1e-5)
    assert evaluated["loss"] == pytest.approx(functional.cross_entropy(logits, torch.from_numpy(labels)).item(), 1e-5)
    found, exact = both.graph.steps(data), in_pytorch(both.net, both.case, data, torch.float64)
    assert found.losses == pytest.approx(exact.losses, rel=1e-5)
    assert found.norms == pytest.approx(exact.norms, rel=1e-4)
    assert max(distances(found, exact).values()) <= 2e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_base_graph_answers_like_the_network(name: str) -> None:
    graphs, values = graphs_of(name, case()), samples(name, 3)[0]
    bare = graphs_of(name, Case(ADAMW, method="head"))
    for form, plain in ((graphs.base, bare.base), (graphs.original, bare.original)):
        np.testing.assert_allclose(outputs(form.model, values), outputs(plain.model, values), atol=1e-6)


def test_what_is_added_is_counted() -> None:
    added = graphs_of("residual", case()).additions
    assert added is not None
    sites = {"layer1.0.conv1": (6, 144), "layer2.0.conv1": (6, 144), "layer3.0.conv1": (8, 36), "fc": (20, 0)}
    products = [2 * channels * max(4, channels // 2) for channels, _ in sites.values()]
    biases = [channels + max(4, channels // 2) for channels, _ in sites.values()]
    maps = [(channels + 1, channels * positions) for channels, positions in sites.values() if positions]
    assert added.parameters == sum(products) + sum(biases) + sum(size for size, _ in maps)
    assert added.multiply_adds == sum(products) + sum(work for _, work in maps)
    assert added.nodes == 3 * 12 + 6  # the head's gate needs no pooling, no reshaping and no map
    assert added.settings == {"reduction": "2"}


@given(
    channels=st.integers(1, 9),
    reduction=st.integers(1, 4),
    size=st.integers(3, 7),
    groups=st.booleans(),
    axes=st.integers(1, 2),
)
@settings(max_examples=6, deadline=None)
def test_a_graph_multiplies_by_both_gates(channels: int, reduction: int, size: int, groups: bool, axes: int) -> None:
    rng = np.random.default_rng(channels)
    count = channels if groups else 1
    shapes = {
        "a.weight": (channels, 2, *[1] * axes),
        "a.bias": (channels,),
        "b.weight": (channels, channels // count, *[3] * axes),
        "b.bias": (channels,),
        "c.weight": (3, channels),
        "c.bias": (3,),
    }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = [size, size + 1][:axes]
    model = from_text(
        f"m = Conv(x, a.weight, a.bias) n = Tanh(m) o = Conv<group = {count}>(n, b.weight, b.bias) "
        "p = GlobalAveragePool(o) q = Flatten(p) y = Gemm<transB = 1>(q, c.weight, c.bias)",
        weights=weights,
        x=f"float[batch,2,{','.join(map(str, sizes))}] x",
        y="float[batch,3] y",
    )
    spec = InputSpec("x", (2, *sizes), 1.0, (0.0,) * 2, (1.0,) * 2, dtype="float32")
    graphs = build_graphs(
        model,
        spec=spec,
        classes=3,
        new_head=False,
        method="attention",
        lora=LoraConfig(reduction=reduction),
        policy="frozen",
    )
    hidden = {t.name: t.shape for t in graphs.plan.trainables}["b.gate_down"]
    assert hidden == (max(4, channels // reduction), channels)
    moved = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in graphs.plan.trainables}
    x = rng.standard_normal((3, 2, *sizes)).astype(np.float32)
    w = {name: torch.from_numpy(value) for name, value in {**weights, **moved}.items()}
    conv = functional.conv1d if axes == 1 else functional.conv2d
    inner = torch.tanh(conv(torch.from_numpy(x), w["a.weight"], w["a.bias"]))
    last = conv(gated(inner, w, "b"), w["b.weight"], w["b.bias"], groups=count).flatten(2).mean(2)
    expected = functional.linear(gated(last, w, "c"), w["c.weight"], w["c.bias"]).numpy()
    found = outputs(with_numbers(graphs.base.model, moved), x)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


def test_a_head_that_is_a_convolution_has_both_gates() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    inner = torch.tanh(net[0](x)).detach()
    report = select_trainable(net, "attention", LORA)
    assert ("2.gate_space", (1, 6, 1, 1)) in [(t.name, t.shape) for t in report.trainables]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        weight, bias = net[2].weight, net[2].bias
        expected = functional.conv2d(gated(inner, dict(net.named_parameters()), "2"), weight, bias).mean((2, 3))
        assert torch.allclose(net(x), expected, atol=1e-6)


def test_the_head_trains_with_the_gates_and_nothing_else_of_the_network() -> None:
    layers = tuple(Layer(f"{b}.conv", f"{b}.conv.weight", f"{b}.conv.bias", (8, 8, 3, 3)) for b in "abcd")
    found = METHODS["attention"](Network(layers, ("fc.weight", (5, 8)), ("fc.bias", (5,)), 0), LoraConfig())
    own = [t.name for t in found.trainables if "gate_" not in t.name]
    assert own == ["fc.weight", "fc.bias"]
    assert found.frozen == tuple((layer.name, "only gates and the head train") for layer in layers)
    assert METHODS["attention"].options == {"reduction", "blocks"}
