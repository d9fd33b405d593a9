"""Skip adapters: the paper's formula, and the same losses, gradients and steps in PyTorch and in the step graph."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from exporter_graphs import from_text, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from module_networks import (
    CLASSES,
    NETWORKS,
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
from torch.nn import functional

from lorac_deploy.lora import LoraConfig, select_trainable
from lorac_exporters.graphs import build_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import Layer, Network
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import BnPolicy, InputSpec, TrainingDefaults

LORA = LoraConfig(rank=2, alpha=3.0)
SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, weight_decay=0.01, clip_norm=0.5)
ADAMW = TrainingDefaults(weight_decay=0.01)
STEPPED = [("frozen", "residual"), ("frozen", "dense"), ("batch", "residual")]


def case(training: TrainingDefaults = ADAMW, policy: BnPolicy = "frozen", lora: LoraConfig = LORA) -> Case:
    return Case(training, policy, lora, "skip")


def test_fully_connected_layers_do_as_the_paper_says() -> None:
    net = prepared("dense", case()).eval()
    first, norm, tanh, second, _, head = net
    x = torch.from_numpy(samples("dense", 3)[0])
    with torch.no_grad():
        inner = tanh(norm(functional.linear(x, first.weight, first.bias)))
        last = tanh(functional.linear(inner, second.weight, second.bias))
        expected = functional.linear(last, head.weight, head.bias)
        for value, layer in ((x, first), (inner, second), (last, head)):
            expected = expected + 1.5 * value @ layer.skip_a.T @ layer.skip_b.T
        assert torch.allclose(net(x), expected, atol=1e-6)


def test_no_gradient_flows_back_into_the_network() -> None:
    x = torch.from_numpy(samples("residual", 2)[0])
    found = []
    for net in (prepared("residual", case()).eval(), network("residual")):
        given_input = x.clone().requires_grad_()
        net(given_input)[:, 0].sum().backward()
        found.append(given_input.grad)
    assert torch.allclose(*found, atol=1e-7)


@pytest.mark.parametrize(("name", "count"), [*((name, 3) for name in NETWORKS), ("residual", 1), ("dense", 1)])
def test_every_gradient_is_pytorchs(name: str, count: int) -> None:
    found, exact = gradients(name, case(), count)
    assert all(np.abs(value).max() > 1e-3 for value in exact.values())
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
    assert max(distances(found, exact).values()) <= 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_frozen_front_hands_on_a_row_of_pooled_features_for_each_site(name: str) -> None:
    both = sides(name, case())
    assert both.graph.front is not None
    rows = [tuple(value.shape[1:]) for value in both.graph.front.get_outputs()]
    pooled = [module.channels for module in both.graph.graphs.plan.modules]
    assert all(len(row) == 1 for row in rows)
    assert sum(row[0] for row in rows) <= sum(pooled)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_base_graph_answers_like_the_network_to_the_bit_of_its_own_arithmetic(name: str) -> None:
    graphs, values = graphs_of(name, case()), samples(name, 3)[0]
    bare = graphs_of(name, Case(ADAMW, method="head"))
    for form, plain in ((graphs.base, bare.base), (graphs.original, bare.original)):
        assert np.array_equal(outputs(form.model, values), outputs(plain.model, values))


def test_what_is_added_is_counted() -> None:
    added = graphs_of("residual", case()).additions
    assert added is not None
    sites = {"layer1.0.conv1": 6, "layer2.0.conv1": 6, "layer3.0.conv1": 8, "fc": 20}
    assert added.sites == tuple(sites)
    assert added.parameters == added.multiply_adds == sum(2 * channels + CLASSES * 2 for channels in sites.values())
    assert added.nodes == 4 * 3 + 2 + 2  # pooling, flattening and two products a site, no pooling at the head; the sum
    assert added.settings == {"r": "2", "alpha": "3.0"}


@given(
    channels=st.integers(1, 5),
    wide=st.integers(1, 6),
    classes=st.integers(2, 4),
    rank=st.integers(1, 3),
    size=st.integers(3, 7),
    length=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_a_graph_adds_the_products_of_pooled_inputs(
    channels: int, wide: int, classes: int, rank: int, size: int, length: bool
) -> None:
    axes = 1 if length else 2
    rng = np.random.default_rng(channels + 10 * wide)
    shapes = {
        "a.weight": (channels, 2, *[1] * axes),
        "b.weight": (wide, channels, *[3] * axes),
        "c.weight": (classes, wide),
        "a.bias": (channels,),
        "b.bias": (wide,),
        "c.bias": (classes,),
    }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = ",".join([str(size)] * axes)
    model = from_text(
        "m = Conv(x, a.weight, a.bias) n = Tanh(m) o = Conv(n, b.weight, b.bias) p = GlobalAveragePool(o) "
        "q = Flatten(p) y = Gemm<transB = 1>(q, c.weight, c.bias)",
        weights=weights,
        x=f"float[batch,2,{sizes}] x",
        y=f"float[batch,{classes}] y",
    )
    spec = InputSpec("x", (2, *[size] * axes), 1.0, (0.0,) * 2, (1.0,) * 2, dtype="float32")
    graphs = build_graphs(
        model,
        spec=spec,
        classes=classes,
        new_head=False,
        method="skip",
        lora=LoraConfig(rank=rank, alpha=rank / 2),
        policy="frozen",
    )
    moved = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in graphs.plan.trainables}
    x = rng.standard_normal((3, 2, *[size] * axes)).astype(np.float32)
    w = {name: torch.from_numpy(value) for name, value in {**weights, **moved}.items()}
    conv = functional.conv1d if length else functional.conv2d
    inner = torch.tanh(conv(torch.from_numpy(x), w["a.weight"], w["a.bias"]))
    spatial = tuple(range(2, 2 + axes))
    last = conv(inner, w["b.weight"], w["b.bias"]).mean(spatial)
    expected = functional.linear(last, w["c.weight"], w["c.bias"])
    for value, layer in ((inner.mean(spatial), "b"), (last, "c")):
        expected = expected + 0.5 * value @ w[f"{layer}.skip_a"].T @ w[f"{layer}.skip_b"].T
    found = outputs(with_numbers(graphs.base.model, moved), x)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_what_projects_down_starts_within_kaimings_bound_and_the_rest_at_zero() -> None:
    values = graphs_of("residual", case()).base.values
    for layer, channels in (("layer3.0.conv1", 8), ("fc", 20)):
        a, b = values[f"{layer}.skip_a"], values[f"{layer}.skip_b"]
        assert 0.5 / math.sqrt(channels) < np.abs(a).max() <= 1 / math.sqrt(channels)
        assert not b.any()
    assert not np.array_equal(values["layer1.0.conv1.skip_a"], values["layer2.0.conv1.skip_a"])


def test_another_seed_gives_other_numbers() -> None:
    first, second = (graphs_of("dense", case(lora=LoraConfig(seed=seed))).base.values for seed in (0, 1))
    assert not np.array_equal(first["0.skip_a"], second["0.skip_a"])


def test_a_head_that_is_a_convolution_is_refused() -> None:
    convs = (Layer("conv", "conv.weight", None, (8, 3, 3, 3)), Layer("last", "last.weight", None, (5, 8, 1, 1)))
    found = Network(convs, ("last.weight", (5, 8, 1, 1)), ("last.bias", (5,)), 0)
    with pytest.raises(ValueError, match="the head last is a convolution: there is no place for it; use lora-c"):
        METHODS["skip"](found, LORA)


def test_a_name_that_the_model_has_already_is_refused() -> None:
    weights = {"c.weight": np.ones((2, 3), np.float32), "c.bias": np.zeros(2, np.float32)}
    body = "c.skip_a = Relu(x) y = Gemm<transB = 1>(c.skip_a, c.weight, c.bias)"
    model = from_text(body, weights=weights, x="float[batch,3] x", y="float[batch,2] y")
    spec = InputSpec("x", (3,), 1.0, (0.0,), (1.0,), dtype="float32")
    with pytest.raises(ConversionError, match=r"c\.skip_a"):
        build_graphs(model, spec=spec, classes=2, new_head=False, method="skip", lora=LORA, policy="frozen")


def test_options_that_change_nothing_are_not_offered() -> None:
    assert METHODS["skip"].options == {"rank", "alpha", "blocks"}
    net = copy.deepcopy(network("dense"))
    report = select_trainable(net, "skip", LoraConfig(rank=3, blocks=("5",)))
    assert [(t.name, t.shape) for t in report.trainables] == [("5.skip_a", (3, 12)), ("5.skip_b", (CLASSES, 3))]
