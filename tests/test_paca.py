"""Method paca: some input channels of each weight train. The oracle is PyTorch with a weight put together by a product.

The product with a one-hot matrix is another way to the weight than `index_copy` or the graph's branch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_artifacts
import torch
from foldable import FILE, images, tiny
from gradient_cases import TOLERANCE, graph_of
from gradient_cases import run as run_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import touch_adapters
from step_networks import (
    Arrays,
    Case,
    batches,
    changes,
    graphs_of,
    in_graph,
    in_pytorch,
    prepared,
    starting,
    step_config,
    step_graph,
    trained_only,
)
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, adapter_tensors, detach, fuse, report_of, select_trainable
from lorac_deploy.partial_layers import PartialConv2d, PartialLinear, take_channels
from lorac_exporters import tflite
from lorac_exporters.engine_files import obstacles
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.inject import starting_values
from lorac_exporters.memory import peak
from lorac_exporters.methods import METHODS
from lorac_exporters.methods.paca import chosen_channels
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.partials import add_partials, read_again
from lorac_exporters.plan import Layer, Network
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.training_step import train_step
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ArtifactError
from lorac_runtime.manifest import Partial, TrainingDefaults
from lorac_runtime.patch import batchnorm_tensors
from lorac_runtime.patch import fuse as fuse_file

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


# Which channels


def test_channels_depend_on_layer_share_and_seed_alone() -> None:
    for count in (1, 2, 3, 16, 130):
        for share in (0.01, 0.25, 0.5, 1.0):
            found = chosen_channels("layer1.conv", count, share, 0)
            assert found == chosen_channels("layer1.conv", count, share, 0)
            assert len(found) == max(1, round(share * count))
            assert list(found) == sorted(set(found))
            assert set(found) <= set(range(count))
    assert chosen_channels("a", 64, 0.25, 0) != chosen_channels("b", 64, 0.25, 0)
    assert chosen_channels("a", 64, 0.25, 0) != chosen_channels("a", 64, 0.25, 1)
    assert set(chosen_channels("a", 64, 0.25, 0)) < set(chosen_channels("a", 64, 0.5, 0))


def test_over_many_layers_every_channel_is_chosen_alike() -> None:
    counts = np.bincount([c for n in range(800) for c in chosen_channels(f"layer{n}", 8, 0.25, 0)], minlength=8)
    assert abs(counts - 200).max() < 4 * np.sqrt(800 * 0.25 * 0.75)


NET = Network(
    convs=(
        Layer("stem", "stem.weight", None, (8, 3, 3, 3)),
        Layer("depthwise", "depthwise.weight", "depthwise.bias", (8, 1, 3, 3), groups=8),
        Layer("wide", "wide.weight", "wide.bias", (16, 8, 1, 1)),
        Layer("odd", "odd.weight", None, (4, 4, 3), obstacle="it is odd"),
    ),
    linears=(Layer("hidden", "hidden.weight", "hidden.bias", (12, 16)),),
    head_weight=("fc.weight", (4, 12)),
    head_bias=("fc.bias", (4,)),
    backbone_parameters=100,
)


def test_the_plan_says_what_trains_and_why_the_rest_does_not() -> None:
    plan = METHODS["paca"](NET, LoraConfig())
    assert [(t.name, t.shape, t.role) for t in plan.trainables] == [
        ("stem.partial", (8, 1, 3, 3), "partial"),
        ("wide.partial", (16, 2, 1, 1), "partial"),
        ("hidden.partial", (12, 4), "partial"),
        ("fc.weight", (4, 12), "weight"),
    ]
    assert [p.channels for p in plan.partials] == [
        chosen_channels(p.layer, p.weight_shape[1], 0.25, 0) for p in plan.partials
    ]
    assert [name for name, _ in plan.frozen] == ["depthwise", "odd"]
    assert dict(plan.frozen)["odd"] == "it is odd"


def test_small_layers_biases_blocks_and_share_change_the_plan() -> None:
    names = {
        key: [t.name for t in METHODS["paca"](NET, config).trainables]
        for key, config in {
            "full": LoraConfig(small_layers="full"),
            "head": LoraConfig(biases="head"),
            "all": LoraConfig(biases="all"),
            "blocks": LoraConfig(blocks=("wide",), biases="all"),
            "whole": LoraConfig(share=1.0),
        }.items()
    }
    partials = ["stem.partial", "wide.partial", "hidden.partial"]
    assert names["full"] == ["stem.partial", "depthwise.weight", "wide.partial", "hidden.partial", "fc.weight"]
    assert names["head"] == [*partials, "fc.weight", "fc.bias"]
    assert names["all"] == [*partials, "depthwise.bias", "wide.bias", "hidden.bias", "fc.weight", "fc.bias"]
    assert names["blocks"] == ["wide.partial", "wide.bias"]
    assert names["whole"] == ["stem.partial", "depthwise.partial", "wide.partial", "hidden.partial", "fc.weight"]
    assert METHODS["paca"](NET, LoraConfig(blocks=("wide",))).frozen[-1] == ("fc", "outside of the trained blocks")
    with pytest.raises(ValueError, match="has no adapters; choose 'frozen' or 'full'"):
        METHODS["paca"](NET, LoraConfig(small_layers="adapter"))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        LoraConfig(share=share)


# In PyTorch


def test_the_start_changes_nothing_and_detach_gives_the_network_back() -> None:
    net, plain = tiny(), tiny()
    report = select_trainable(net, "paca", LoraConfig(small_layers="full"))
    assert torch.equal(net(images()), plain(images()))
    assert [type(net[i]) for i in (0, 2, 5)] == [PartialConv2d] * 3
    assert "2 of 4 input channels train" not in repr(net[2])
    assert "1 of 4 input channels train" in repr(net[2])
    assert str(report).endswith("0 layers frozen; some channels of 3 layers")
    assert not net[2].weight.requires_grad
    touch_adapters(net)
    assert not torch.equal(net(images()), plain(images()))
    assert sorted(detach(net)) == ["0.partial", "2.partial", "5.partial", "8.weight"]
    assert [type(part) for part in net] == [type(part) for part in plain]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_the_fused_network_holds_the_trained_channels() -> None:
    net = tiny()
    select_trainable(net, "paca", SHARE)
    touch_adapters(net)
    fused = fuse(net)
    torch.testing.assert_close(fused(images()), net.eval()(images()))
    for partial in report_of(net).partials:
        own, new = (module.get_submodule(partial.layer).weight for module in (net, fused))
        trained = net.get_parameter(partial.tensor)
        assert torch.equal(new, put_together(own, trained, partial.channels))
    assert fused.state_dict().keys() == tiny().state_dict().keys()


def test_a_linear_layer_and_a_circular_convolution_train_in_part() -> None:
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, 6)
    for layer, data in ((linear, x), (conv, torch.randn(2, 6, 5, 5))):
        plain = copy.deepcopy(layer)
        shape = tuple(layer.weight.shape)
        made: Any = take_channels(layer, Partial("", "weight", "partial", shape, 1, (0, 4)))
        with torch.no_grad():
            made.partial += 1
            plain.weight[:, [0, 4]] += 1
        torch.testing.assert_close(made(data), plain(data))
    assert isinstance(linear, PartialLinear)
    with pytest.raises(TypeError, match="got ConvTranspose2d"):
        take_channels(nn.ConvTranspose2d(4, 4, 3), Partial("", "weight", "partial", (4, 4, 3, 3), 1, (0,)))


def test_a_prepared_network_is_no_checkpoint_and_cannot_be_folded(tmp_path: Path) -> None:
    net = tiny()
    select_trainable(net, "paca", SHARE)
    with pytest.raises(ValueError, match="fold first, then attach"):
        fold_batchnorm(net)
    with pytest.raises(ValueError, match="already prepared"):
        select_trainable(net, "full", SHARE)
    with pytest.raises(ValueError, match="a checkpoint holds a plain network"):
        save_checkpoint(tmp_path, net, None, input_spec=None, class_names=(), metrics={})  # type: ignore[arg-type]


# The step graph


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


# Artifacts and adapter files


def config(**fields: Any) -> dict[str, Any]:
    return {"method": "paca", "lora": SHARE, "training": PLAIN_SGD, **fields}


def device_steps(engine: Any, count: int = 3) -> list[float]:
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(count):
        x = rng.standard_normal((6, *small_artifacts.SPEC.shape)).astype(np.float32)
        losses.append(engine.train_step(x, rng.integers(0, 4, 6), 0.05))
    return losses


def run_file(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"input": x})[0]
    return found


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> mf.Manifest:
    folder = tmp_path_factory.mktemp("paca") / "artifact"
    return small_artifacts.export(folder, **config(tflite="none")).manifest


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_both_engines_train_alike_and_the_fused_file_answers_like_the_device(tmp_path: Path, policy: Any) -> None:
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config(engine="both", bn_policy=policy))
    manifest = mf.load(folder)
    assert [p.tensor for p in manifest.partials] == ["0.partial", "3.partial"]
    x = np.random.default_rng(5).standard_normal((4, *small_artifacts.SPEC.shape)).astype(np.float32)
    ends = []
    for name in ("onnxruntime", "onnxruntime-training"):
        engine = open_engine(folder, manifest, engine=name, threads=1)
        fuse_file(folder, tmp_path / "start.onnx", engine.state())
        if policy == "frozen":
            assert (tmp_path / "start.onnx").read_bytes() == (folder / mf.BASE).read_bytes()
        if policy == "recalibrate":
            engine.recalibrate([x])
            fuse_file(folder, tmp_path / "recalibrated.onnx", engine.state())
            net = small_artifacts.network()
            recalibrate(net, [torch.from_numpy(x)])
            expected = net.eval()(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(run_file(tmp_path / "recalibrated.onnx", x), expected, atol=2e-5)
        losses = device_steps(engine)
        fuse_file(folder, tmp_path / "fused.onnx", engine.state())
        _, logits = engine.eval_step(x, np.zeros(4, np.int64))
        np.testing.assert_allclose(run_file(tmp_path / "fused.onnx", x), logits, atol=2e-5)
        ends.append((losses, engine.state()))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5)
    for name, value in ends[0][1].items():
        np.testing.assert_allclose(value, ends[1][1][name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8"])
def test_the_patched_tflite_file_is_what_exporting_the_fused_network_gives(tmp_path: Path, weights: Any) -> None:
    folder = tmp_path / "artifact"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 10, 3), dtype=np.uint8) if weights == "int8" else None
    small_artifacts.export(folder, **config(tflite=weights), calibration=pixels)
    state = load_adapter(folder / mf.ADAPTER).tensors
    state = {
        n: (v + 0.05 * np.random.default_rng(1).uniform(size=v.shape)).astype(np.float32) for n, v in state.items()
    }
    report = fuse_file(folder, tmp_path / "fused.tflite", state, base=mf.BASE_TFLITE)
    fuse_file(folder, tmp_path / "fused.onnx", state)
    manifest = mf.load(folder)
    tflite.export(
        read_graph(tmp_path / "fused.onnx"),
        tmp_path / "fresh.tflite",
        tflite.TfliteConfig(weights),
        spec=manifest.input,
        class_names=manifest.class_names,
        name=manifest.model,
        calibration=tflite.ranges_of(folder / mf.BASE_TFLITE) if weights == "int8" else None,
    )
    assert {"0.weight", "3.weight", "7.weight"} <= set(report.tensors)
    assert (tmp_path / "fused.tflite").read_bytes() == (tmp_path / "fresh.tflite").read_bytes()


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_file_from_pytorch_gives_back_the_network_that_wrote_it(tmp_path: Path, policy: Any) -> None:
    net, other = tiny(), tiny()
    written = dataclasses.replace(PACA, blocks=("2", "5", "8"), small_layers="full")
    select_trainable(net, "paca", written, bn_policy=policy)
    touch_adapters(net)
    if policy != "frozen":
        recalibrate(net, [images()])
    save_module_adapter(tmp_path / FILE, net, model="tiny")
    found = attach_adapter(tmp_path / FILE, other)
    assert found.partials == report_of(net).partials
    assert found.trainables == report_of(net).trainables
    assert torch.equal(other.eval()(images()), net.eval()(images()))


def test_an_unfolded_adapter_moves_to_a_device_and_back(tmp_path: Path) -> None:
    net = small_artifacts.network()
    select_trainable(net, "paca", SHARE)
    touch_adapters(net, size=0.1)
    save_module_adapter(tmp_path / FILE, net, model="net")
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config(), adapter=tmp_path / FILE)
    manifest, x = mf.load(folder), torch.randn(4, 3, 10, 10)
    start = load_adapter(folder / mf.ADAPTER)
    fuse_file(folder, tmp_path / "fused.onnx", start.tensors)
    np.testing.assert_allclose(run_file(tmp_path / "fused.onnx", x.numpy()), net(x).detach().numpy(), atol=2e-5)
    assert start.metadata["coordinates"] == "folded"
    assert not np.allclose(start.tensors["0.partial"], net[0].partial.detach().numpy(), atol=1e-3)
    again = to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), load_adapter(tmp_path / FILE))
    assert all(np.array_equal(again[name], value) for name, value in start.tensors.items())
    back = small_artifacts.network()
    attach_adapter(folder / mf.ADAPTER, back)
    for name, value in adapter_tensors(back).items():
        torch.testing.assert_close(value, net.get_parameter(name), rtol=1e-5, atol=1e-6)
    folded = fold_batchnorm(small_artifacts.network())
    attach_adapter(folder / mf.ADAPTER, folded)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=2e-5)


def test_channels_whose_scale_is_zero_cannot_be_unfolded(tmp_path: Path) -> None:
    net = tiny()
    with torch.no_grad():
        net[1].weight[2] = 0.0
    device = fold_batchnorm(net)
    select_trainable(device, "paca", SHARE)
    save_module_adapter(tmp_path / FILE, device, model="tiny")
    untrained = copy.deepcopy(net)
    (first, *_) = attach_adapter(tmp_path / FILE, untrained).partials
    torch.testing.assert_close(untrained[0].partial, net[0].weight[:, list(first.channels)])  # the network's own
    touch_adapters(device)
    save_module_adapter(tmp_path / FILE, device, model="tiny")
    with pytest.raises(AdapterError, match="rows were trained where gamma / sigma of 1 is near zero"):
        attach_adapter(tmp_path / FILE, net)


def test_an_adapter_of_other_channels_is_refused_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    small_artifacts.export(folder, **config())
    net = small_artifacts.network()
    select_trainable(net, "paca", dataclasses.replace(SHARE, seed=4))
    save_module_adapter(tmp_path / FILE, net, model="net")
    manifest = mf.load(folder)
    with pytest.raises(AdapterError, match="channels: the adapter has"):
        to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), load_adapter(tmp_path / FILE))
    with pytest.raises(AdapterError, match="channels: the file says"):
        load_module_adapter(folder / mf.ADAPTER, net)
    file = load_adapter(tmp_path / FILE)
    save_adapter(tmp_path / FILE, file.tensors, file.metadata | {"share": "2"})
    with pytest.raises(AdapterError, match="share must be above 0"):
        attach_adapter(tmp_path / FILE, small_artifacts.network())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"channels": (5, 1)}, "channels: must ascend within 0 to 15, got 5, 1"),
        ({"channels": (1, 1)}, "channels: must ascend"),
        ({"channels": (1, 16)}, "channels: must ascend"),
        ({"channels": (-1, 2)}, "channels: must ascend"),
        ({"channels": ()}, "channels: must ascend within 0 to 15, got none"),
        ({"channels": (1, 2)}, "3.partial has shape (16, 6, 3, 3), expected (16, 2, 3, 3)"),
        ({"tensor": "else"}, "else is not among the trainables"),
        ({"weight_shape": (16, 0, 3, 3)}, "weight_shape must be 2 to 4 positive numbers"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    manifest: mf.Manifest, change: dict[str, Any], problem: str
) -> None:
    partials = (manifest.partials[0], dataclasses.replace(manifest.partials[1], **change))
    with pytest.raises(ArtifactError) as error:
        mf.parse(dataclasses.replace(manifest, partials=partials).to_json())
    assert problem in str(error.value)


class Atan(nn.Module):
    """Has no gradient rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(x)


def test_what_an_engine_cannot_differentiate_behind_trained_channels_is_named() -> None:
    for lora, found in ((SHARE, ["Atan"]), (dataclasses.replace(SHARE, blocks=("3", "7")), [])):
        graphs = graphs_with(Atan(), "paca", lora)
        assert [problem.operator for problem in obstacles(graphs, "onnxruntime")] == found


def test_the_frozen_front_hands_on_the_whole_input_of_the_first_trained_layer(tmp_path: Path) -> None:
    """Not these channels of it beside the layer's output, which would take more room."""
    lora = dataclasses.replace(SHARE, blocks=("3", "7"))
    manifest = small_artifacts.export(tmp_path / "artifact", **config(lora=lora)).manifest
    assert [f.shape for f in manifest.features] == [(16, 8, 8)]
