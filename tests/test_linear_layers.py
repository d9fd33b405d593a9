"""Fully connected layers of ONNX files and of plans: which take an adapter, and what is said of the others."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from adapted_steps import (
    SGD,
    Sample,
    check_steps,
    fan,
    graphs_of,
    sample,
    vgg,
)
from exporter_graphs import from_text, numbers
from shared_export import export_graph
from step_runs import Case
from torch import nn

from lorac_deploy.lora import LoraConfig, detach, select_trainable
from lorac_exporters.branches import FORMS, Form
from lorac_exporters.graph_tools import array
from lorac_exporters.graphs import build_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import Layer, Network
from lorac_runtime.manifest import InputSpec

LORA = LoraConfig(rank=2)
BODY = """
    f = Flatten (input)  a = Gemm <transB = 1> (f, one.weight, one.bias)  b = Tanh (a)
    c = Gemm <{how}> (b, two.weight, two.bias)  d = Tanh (c)
    e = Gemm <transB = 1> (d, three.weight)  g = Tanh (e)  y = Gemm <{head}> (g, fc.weight, fc.bias)
"""
SHAPES = {
    "one_weight": (6, 192),
    "one_bias": (6,),
    "two_weight": (6, 6),
    "two_bias": (6,),
    "three_weight": (6, 6),
    "fc_weight": (5, 6),
    "fc_bias": (5,),
}
SPEC = InputSpec("input", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.25,) * 3)


def onnx_file(*, how: str = "transB = 1", head: str = "transB = 1", **shapes: tuple[int, ...]) -> ir.Model:
    weights = {name: 0.3 * value for name, value in numbers(**(SHAPES | shapes)).items()}
    return from_text(BODY.format(how=how, head=head), weights=weights, x="float[batch,3,8,8] input")


class FromFile(nn.Module):
    """The network of `onnx_file`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) -> (N, 5)."""
        for layer in (self.one, self.two, self.three):
            x = torch.tanh(layer(x.flatten(1)))
        return self.fc(x)


@pytest.mark.parametrize("method", ["lora-c", "lora-all"])
def test_an_onnx_file_with_gemm_layers_is_adapted_like_the_network_that_it_holds(method: str) -> None:
    model, net = onnx_file(), FromFile()
    initializers = model.graph.initializers.items()
    net.load_state_dict({name: torch.tensor(array(value)) for name, value in initializers})
    case = Case(SGD, lora=LoraConfig(rank=1, biases="all"), method=method)
    graphs = graphs_of(model, case, spec=SPEC, classes=5)
    check_steps(Sample(net.eval(), (3, 8, 8), 5), case, graphs=graphs)
    assert select_trainable(net, method, case.lora).adapters == graphs.plan.adapters
    assert [a.layer for a in graphs.plan.adapters] == EXPECTED[method]


EXPECTED = {"lora-c": ["two", "three"], "lora-all": ["one", "two", "three", "fc"]}
STORED = "its weight is stored as (in, out), an adapter needs (out, in) as nn.Linear stores it"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("transB = 0", STORED),
        ("transB = 1, alpha = 0.5", "it scales its sum (alpha = 0.5), an adapter needs a plain product"),
        ("transB = 1, beta = 2.0", "it scales its sum (beta = 2), an adapter needs a plain product"),
    ],
)
def test_a_gemm_that_is_no_plain_layer_says_why_it_takes_no_adapter_and_trains_in_full(how: str, reason: str) -> None:
    plan = graphs_of(onnx_file(how=how), Case(SGD, lora=LORA), spec=SPEC, classes=5).plan
    assert [a.layer for a in plan.adapters] == ["three"]
    assert dict(plan.frozen)["two"] == reason
    full = graphs_of(onnx_file(how=how), Case(SGD, method="full"), spec=SPEC, classes=5).plan
    assert {"two.weight", "two.bias"} <= {t.name for t in full.trainables}


def test_a_head_that_is_stored_the_other_way_round_stays_frozen_under_lora_all() -> None:
    model = onnx_file(head="transB = 0", fc_weight=(6, 5))
    plan = graphs_of(model, Case(SGD, lora=LORA, method="lora-all"), spec=SPEC, classes=5).plan
    assert plan.frozen == (("fc", STORED),)
    assert "fc.weight" in {t.name for t in graphs_of(model, Case(SGD, lora=LORA), spec=SPEC, classes=5).plan.trainables}


def test_a_shared_weight_takes_no_adapter_in_a_graph_nor_in_pytorch() -> None:
    net = FromFile().eval()
    net.three.weight = net.two.weight
    model = export_graph(net, (3, 8, 8))
    plan = graphs_of(model, Case(SGD, lora=LORA, method="lora-all"), spec=SPEC, classes=5).plan
    assert [reason for _, reason in plan.frozen] == ["its weight is shared with another layer"]
    report = select_trainable(net, "lora-all", LORA)
    assert dict(report.frozen)["two"] == "its weight is shared with three"
    assert plan.adapters == report.adapters


class OwnLinear(nn.Linear):
    """A subclass, whose own forward an adapter would replace."""


def test_subclasses_of_linear_are_named_with_the_reason_but_may_be_the_stem() -> None:
    net = nn.Sequential(OwnLinear(4, 8), OwnLinear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    report = select_trainable(net, "lora-c", LORA)
    reason = "OwnLinear takes no adapter, only plain nn.Linear does"
    assert (report.full, report.frozen) == (("0.weight", "3.weight"), (("1", reason),))
    detach(net)
    assert select_trainable(net, "lora-all", LORA).frozen == (("0", reason), ("1", reason))


def test_the_stem_of_a_network_without_convolutions_can_be_named() -> None:
    net = nn.ModuleDict({"late": nn.Linear(8, 8), "first": nn.Linear(4, 8), "fc": nn.Linear(8, 2)})
    report = select_trainable(net, "lora-c", LORA, stem="first")
    assert (report.full, [a.layer for a in report.adapters]) == (("first.weight", "fc.weight"), ["late"])
    with pytest.raises(ValueError, match=r"stem 'fc' is not a linear layer before the head.*candidates are 1, 3"):
        select_trainable(nn.ModuleDict(dict(fan().net.named_children())), "lora-c", LORA, stem="fc")


def conv(name: str, *shape: int) -> Layer:
    return Layer(name, f"{name}.weight", f"{name}.bias", shape)


def facts(*, convs: bool) -> Network:
    layers = (conv("stem", 8, 3, 3, 3), conv("body", 64, 8, 3, 3)) if convs else ()
    linears = (conv("one", 64, 64), conv("two", 64, 64))
    return Network(layers, ("fc.weight", (10, 64)), ("fc.bias", (10,)), 1000, linears=linears)


def test_lora_all_adapts_every_layer_and_trains_no_weight_in_full() -> None:
    plan = METHODS["lora-all"](facts(convs=True), LoraConfig(rank=4, rank_mode="r", biases="all"))
    assert [a.layer for a in plan.adapters] == ["stem", "body", "one", "two", "fc"]
    assert [t.name for t in plan.trainables if t.role != "lora_a" and t.role != "lora_b"] == [
        *("stem.bias", "body.bias", "one.bias", "two.bias", "fc.bias")
    ]
    factors = 4 * ((9 + 24) + (24 + 192) + 2 * (64 + 64) + (64 + 10))
    assert plan.trained_parameters == factors + 8 + 64 + 64 + 64 + 10
    assert plan.frozen == ()
    assert METHODS["lora-all"](facts(convs=True), LoraConfig(rank=4)).trained_parameters > 0


def test_lora_all_inside_of_blocks() -> None:
    plan = METHODS["lora-all"](facts(convs=True), LoraConfig(rank=1, blocks=("body", "fc"), biases="head"))
    assert [t.name for t in plan.trainables] == ["body.lora_a", "body.lora_b", "fc.lora_a", "fc.lora_b", "fc.bias"]
    assert [name for name, _ in plan.frozen] == ["stem", "one", "two"]


def test_a_network_without_convolutions_has_its_first_fully_connected_layer_in_full() -> None:
    plan = METHODS["lora-c"](facts(convs=False), LoraConfig(rank=2))
    assert [t.name for t in plan.trainables] == ["one.weight", "two.lora_a", "two.lora_b", "fc.weight"]


def test_the_graph_of_a_network_with_a_fresh_head_takes_adapters_on_all_layers() -> None:
    model, lora = export_graph(vgg().net, (3, 10, 10)), LoraConfig(rank=2)
    settings = {"spec": vgg().spec, "classes": 7, "new_head": True, "policy": "frozen", "lora": lora}
    graphs = build_graphs(model, method="lora-all", **settings)  # type: ignore[arg-type]
    assert graphs.plan.adapters[-1].weight_shape == (7, 20)
    assert graphs.base.values["11.weight"].any()
    assert "11.weight" in graphs.patched_shapes()


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_is_a_convolution_gets_its_adapter_under_lora_all(form: Form) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    given = sample(nn.Sequential(*layers), (3, 9, 9), 4)
    plan = check_steps(given, Case(SGD, lora=LoraConfig(rank=1, biases="head"), method="lora-all", form=form)).plan
    assert [(a.layer, a.weight_shape) for a in plan.adapters] == [("0", (6, 3, 3, 3)), ("2", (4, 6, 1, 1))]
    assert [t.name for t in plan.trainables if t.role == "bias"] == ["2.bias"]
