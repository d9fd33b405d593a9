"""Method paca in the step graph. The oracle is PyTorch with a weight put together by a product.

The product with a one-hot matrix is another way to the weight than `index_copy` or the graph's branch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import small_artifacts
import torch
from gradient_cases import TOLERANCE, graph_of
from gradient_cases import run as run_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_export import export_graph
from step_networks import batches, graphs_of, prepared, step_graph
from step_runs import Arrays, Case, changes, in_graph, in_pytorch, starting, step_config, trained_only
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.lora import LoraConfig, adapter_tensors, detach, report_of
from lorac_exporters.engine_files import obstacles
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.inject import starting_values
from lorac_exporters.memory import peak
from lorac_exporters.methods.paca import chosen_channels
from lorac_exporters.partials import add_partials, read_again
from lorac_exporters.training_step import train_step
from lorac_runtime.manifest import Partial, TrainingDefaults

SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, clip_norm=0.0)
ADAMW = TrainingDefaults(weight_decay=0.05, clip_norm=0.5)
PLAIN_SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
PACA = LoraConfig(share=0.4, biases="all", seed=3)
SHARE = LoraConfig(share=0.4, seed=3)


def put_together(weight: Tensor, partial: Tensor, channels: tuple[int, ...]) -> Tensor:
    """``weight`` with ``partial`` in its places, by a product with a one-hot matrix."""
    places = torch.eye(weight.shape[1], dtype=weight.dtype)[list(channels)]
    return weight * (1 - places.sum(0)).reshape(1, -1, *[1] * (weight.ndim - 2)) + torch.einsum(
        "om...,mi->oi...", partial, places
    )


@pytest.mark.parametrize("policy", ["frozen", "batch"])
@pytest.mark.parametrize("training", [PLAIN_SGD, SGD, ADAMW], ids=["sgd", "momentum", "adamw"])
def test_steps_agree_with_pytorch(training: TrainingDefaults, policy: Any) -> None:
    """With plain SGD, what a tensor moved by is its gradient: every one is compared."""
    lora = PACA if policy == "frozen" else SHARE  # biases in front of BN get no gradient but noise
    case = Case(training, method="paca", policy=policy, lora=lora)
    net = prepared("small", case, smooth=True)
    start = starting(net, case)
    steps = batches("small", steps=3, lr=0.01)
    found = in_graph(step_graph("small", case, start, smooth=True), start, steps)
    exact = in_pytorch(net, case, steps, torch.float64)
    np.testing.assert_allclose(found.losses, exact.losses, rtol=2e-6)
    np.testing.assert_allclose(found.norms, exact.norms, rtol=1e-4)
    assert max(trained_only(changes(found, exact, start)).values()) < 1e-3
    moved = [name for name in start if "running" not in name and not np.array_equal(found.tensors[name], start[name])]
    assert sorted(moved) == sorted(t.name for t in graphs_of("small", case, smooth=True).plan.trainables)


def test_pytorch_s_gradients_are_those_of_a_weight_put_together() -> None:
    case = Case(SGD, method="paca", lora=PACA)
    net = prepared("small", case, smooth=True).double()
    images_, labels, _ = batches("small", steps=2)[0]
    x, y = torch.from_numpy(images_).double(), torch.from_numpy(labels)
    functional.cross_entropy(net(x), y).backward()
    report = report_of(net)
    plain = copy.deepcopy(net)
    detach(plain)
    plain.eval()  # BN is an ordinary layer again
    tensors = {name: value.double().requires_grad_() for name, value in adapter_tensors(net).items()}
    weights: dict[str, Tensor] = {n: v for n, v in tensors.items() if not n.endswith(".partial")}
    for partial in report.partials:
        own = net.get_submodule(partial.layer).weight.detach()  # type: ignore[union-attr]
        weights[partial.weight] = put_together(own, tensors[partial.tensor], partial.channels)
    functional.cross_entropy(torch.func.functional_call(plain, weights, (x,)), y).backward()
    for name, value in tensors.items():
        torch.testing.assert_close(net.get_parameter(name).grad, value.grad, rtol=1e-10, atol=1e-14)


GEOMETRIES = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3]),
        "ins": st.integers(1, 5),
        "outs": st.integers(1, 4),
        "kernel": st.one_of(st.tuples(st.integers(1, 3)), st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "share": st.sampled_from([0.2, 0.5, 1.0]),
    }
)


@settings(max_examples=40)
@given(GEOMETRIES, st.sampled_from(["branch", "weight"]), st.booleans())
def test_convolutions_of_every_geometry(geometry: Mapping[str, Any], form: Any, squashed: bool) -> None:
    """y and the gradients with respect to x, to the trained channels, and to what x was computed from."""
    g, rank = geometry, len(geometry["kernel"])
    partial = Partial(
        "conv",
        "w",
        "conv.partial",
        (g["outs"] * g["groups"], g["ins"], *g["kernel"]),
        g["groups"],
        chosen_channels("conv", g["ins"], g["share"], 0),
    )
    rng = np.random.default_rng(0)
    values = {
        "x": rng.standard_normal((2, g["ins"] * g["groups"], *(7,) * rank)),
        "w": rng.standard_normal(partial.weight_shape),
        "b": rng.standard_normal(partial.weight_shape[0]),
        "p": rng.standard_normal(partial.shape),
    }
    inputs = {name: value.astype(np.float32) for name, value in values.items()}
    found = _by_graph(inputs, partial, g, form, squashed=squashed)
    for name, value in _by_torch(inputs, partial, g, squashed=squashed).items():
        assert np.abs(found[name] - value).max() <= TOLERANCE * max(1.0, np.abs(value).max()), name


def _by_graph(inputs: Arrays, partial: Partial, g: Mapping[str, Any], form: Any, *, squashed: bool) -> Arrays:
    rank = len(g["kernel"])
    attributes = (
        f"strides=[{','.join([str(g['stride'])] * rank)}], dilations=[{','.join([str(g['dilation'])] * rank)}], "
        f"pads=[{','.join([str(g['padding'])] * 2 * rank)}], group={g['groups']}"
    )
    first = "h = Relu(x)" if squashed else "h = Mul(x, x)"
    model = graph_of(f"{first}\n y = Conv<{attributes}>(h, w, b)", {n: inputs[n] for n in "xwb"}, fixed=("w", "b"))
    tape, y = Tape(model.graph), model.graph.outputs[0]
    trained = tape.input("p", partial.shape)
    chosen = add_partials(tape, [partial], {partial.tensor: trained}, form=form)
    y = model.graph.outputs[0]
    loss = tape.op("ReduceSum", tape.op("Mul", y, y, like=y), shape=(), attributes={"keepdims": 0})
    wanted = differentiate(tape, loss, [model.graph.inputs[0], trained])
    read_again(tape, chosen, loss)
    model.graph.outputs.extend(wanted)
    return dict(zip(("y", "x", "p"), run_graph(model, inputs), strict=True))


def _by_torch(inputs: Arrays, partial: Partial, g: Mapping[str, Any], *, squashed: bool) -> Arrays:
    t = {name: torch.from_numpy(value).double() for name, value in inputs.items()}
    x, p = t["x"].requires_grad_(), t["p"].requires_grad_()
    conv = functional.conv1d if len(g["kernel"]) == 1 else functional.conv2d
    h = torch.relu(x) if squashed else x * x
    weight = put_together(t["w"], p, partial.channels)
    y = conv(h, weight, t["b"], g["stride"], g["padding"], g["dilation"], g["groups"])
    y.square().sum().backward()
    assert x.grad is not None
    assert p.grad is not None
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "p": p.grad.numpy()}


def test_a_fully_connected_layer_in_the_graph() -> None:
    rng = np.random.default_rng(1)
    inputs = {n: rng.standard_normal(s).astype(np.float32) for n, s in {"x": (3, 6), "w": (4, 6), "b": (4,)}.items()}
    inputs["p"] = rng.standard_normal((4, 2)).astype(np.float32)
    partial = Partial("fc", "w", "fc.partial", (4, 6), 1, (1, 5))
    model = graph_of("y = Gemm<transB=1, alpha=0.5>(x, w, b)", {n: inputs[n] for n in "xwb"}, fixed=("w", "b"))
    tape = Tape(model.graph)
    trained = tape.input("p", (4, 2))
    add_partials(tape, [partial], {"fc.partial": trained})
    y = model.graph.outputs[0]
    loss = tape.op("ReduceSum", tape.op("Mul", y, y, like=y), shape=(), attributes={"keepdims": 0})
    model.graph.outputs.extend(differentiate(tape, loss, [model.graph.inputs[0], trained]))
    t = {name: torch.from_numpy(value).double().requires_grad_() for name, value in inputs.items()}
    exact = 0.5 * t["x"] @ put_together(t["w"], t["p"], (1, 5)).T + t["b"]
    exact.square().sum().backward()
    for found, expected in zip(run_graph(model, inputs), (exact, t["x"].grad, t["p"].grad), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)  # type: ignore[union-attr]


def graphs_with(activation: nn.Module, method: str, lora: LoraConfig) -> Graphs:
    """Of the network of `small_artifacts`."""
    net = small_artifacts.network(activation=activation)
    return build_graphs(
        export_graph(net, small_artifacts.SPEC.shape),
        spec=small_artifacts.SPEC,
        classes=4,
        new_head=False,
        method=method,
        lora=lora,
        policy="frozen",
    )


def test_behind_a_relu_no_activation_is_kept_that_full_training_would_not_keep() -> None:
    """There a layer's input is kept for the mask anyway, and no channels beside it; elsewhere only these are kept."""
    saved = {}
    for activation in (nn.ReLU(), nn.Identity()):
        for method in ("paca", "full"):
            graphs = graphs_with(activation, method, SHARE)
            case = Case(ADAMW, method=method, lora=SHARE)
            start = starting_values(graphs.plan, graphs.trained.values, seed=0)
            found = peak(train_step(graphs, start, step_config(case)), 8)
            saved[method, type(activation)] = found.saved
    channels, pixels = 6, 8 * 8  # of the 16 that the second convolution reads
    assert saved["paca", nn.ReLU] == saved["full", nn.ReLU]
    assert saved["full", nn.Identity] - saved["paca", nn.Identity] == 8 * (16 - channels) * pixels * 4


class Asinh(nn.Module):
    """Has no gradient rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


def test_what_an_engine_cannot_differentiate_behind_trained_channels_is_named() -> None:
    for lora, found in ((SHARE, ["Asinh"]), (dataclasses.replace(SHARE, blocks=("3", "7")), [])):
        graphs = graphs_with(Asinh(), "paca", lora)
        assert [problem.operator for problem in obstacles(graphs, "onnxruntime")] == found
