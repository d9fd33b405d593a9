"""Branches in an ONNX graph against the fused weight, computed apart from the graph."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_export import export_graph

from lorac_deploy.models import ModelSpec, build
from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.inject import count_parameters, describe, inject, starting_values
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.errors import ConversionError

CLASSES = 3


def network(
    *,
    c_in: int = 4,
    c_out: int = 8,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
) -> ir.Model:
    """input (N, 3, 12, 12) -> stem 3x3 -> the convolution in question -> mean -> head."""
    rng = np.random.default_rng(3)
    shapes = {
        "stem.weight": (c_in, 3, 3, 3),
        "body.weight": (c_out, c_in // groups, *kernel),
        "fc.weight": (CLASSES, c_out),
        "fc.bias": (CLASSES,),
    }
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        onnx.helper.make_node("Conv", ["input", "stem.weight"], ["x1"], "stem", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["x1"], ["x2"], "act"),
        onnx.helper.make_node(
            "Conv",
            ["x2", "body.weight"],
            ["x3"],
            "body",
            group=groups,
            strides=[stride, stride],
            dilations=[dilation, dilation],
            pads=[dilation, 0, 1, 2],
        ),
        onnx.helper.make_node("GlobalAveragePool", ["x3"], ["x4"], "pool"),
        onnx.helper.make_node("Flatten", ["x4"], ["x5"], "flat"),
        onnx.helper.make_node("Gemm", ["x5", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [info("input", 1, ["batch", 3, 12, 12])],
        [info("logits", 1, ["batch", CLASSES])],
        tensors,
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9))


def run(model: ir.Model) -> np.ndarray:
    images = np.random.default_rng(4).standard_normal((2, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    result: np.ndarray = session.run(None, {"input": images})[0]
    return result


def adapted(base: Canonical, config: LoraConfig, *, touch: float) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The graph with branches; lora_b and alpha moved away from their start by ``touch``."""
    plan = METHODS["lora-c"](describe(base), config)
    values = starting_values(plan, base.values, seed=0)
    rng = np.random.default_rng(5)
    for name in values:
        if name.endswith("lora_b"):
            values[name] = (touch * rng.standard_normal(values[name].shape)).astype(np.float32)
        if name.endswith("lora_alpha"):
            values[name] += np.float32(touch)
    model = base.model.clone()
    inject(model, plan, values)
    return model, values


def by_loops(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """The delta element by element (methods.md, section 1), the oracle."""
    _, c_in, k_h, k_w = shape
    product, result = b.astype(np.float64) @ a.astype(np.float64), np.zeros(shape)
    for o, i, u, v in np.ndindex(*shape):
        n = (i * k_h + u) * k_w + v
        row, column = (
            (o * k_h + n // (c_in * k_w), n % (c_in * k_w)) if layout == "paper" else (o * k_h + u, i * k_w + v)
        )
        result[o, i, u, v] = product[row, column]
    return result


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    layout=st.sampled_from(LAYOUTS),
    learnable=st.booleans(),
)
def test_a_branch_answers_like_the_fused_weight(
    groups: int, kernel: tuple[int, int], stride: int, dilation: int, layout: Layout, learnable: bool
) -> None:
    base = canonicalize(network(kernel=kernel, groups=groups, stride=stride, dilation=dilation))
    config = LoraConfig(rank=1, rank_mode="r", layout=layout, learnable_alpha=learnable)
    model, values = adapted(base, config, touch=0.3)
    if "body.lora_a" not in values:  # the adapter would not be smaller than the weight
        assert run(model).shape == (2, CLASSES)
        return
    shape = base.values["body.weight"].shape
    scale = (2.0 + 0.3 if learnable else 2.0) / 1
    delta = by_loops(values["body.lora_a"], values["body.lora_b"], shape, layout) * scale
    fused = base.model.clone()
    fused.graph.initializers["body.weight"].const_value = ir.tensor(
        (base.values["body.weight"] + delta).astype(np.float32), name="body.weight"
    )
    expected = run(fused)
    np.testing.assert_allclose(run(model), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
    assert np.abs(expected - run(base.model)).max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learnable", [False, True])
def test_with_lora_b_zero_the_adapted_graph_is_the_base(layout: Layout, learnable: bool) -> None:
    base = canonicalize(network())
    model, _ = adapted(base, LoraConfig(layout=layout, learnable_alpha=learnable), touch=0.0)
    np.testing.assert_array_equal(run(model), run(base.model))


def test_every_adapter_tensor_is_an_initializer_under_its_own_name() -> None:
    base = canonicalize(network())
    model, values = adapted(base, LoraConfig(rank=1, learnable_alpha=True), touch=0.0)
    assert set(values) == {"stem.weight", "body.lora_a", "body.lora_b", "body.lora_alpha", "fc.weight"}
    for name, value in values.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), value)  # type: ignore[union-attr]


def test_first_values_are_kaiming_uniform_and_follow_the_seed() -> None:
    base = canonicalize(network())
    plan = METHODS["lora-c"](describe(base), LoraConfig(rank=1))
    first, again, other = (starting_values(plan, base.values, seed=s)["body.lora_a"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0
    bound = 1 / np.sqrt(4 * 3)  # fan-in: c_in * k_w
    assert 0.8 * bound < np.abs(first).max() <= bound


def test_a_frozen_a_has_the_same_first_values_and_is_in_the_graph_all_the_same() -> None:
    base = canonicalize(network())
    trains, frozen = (adapted(base, LoraConfig(rank=1, freeze_a=f), touch=0.3) for f in (False, True))
    assert frozen[1].keys() == trains[1].keys()
    for name, value in trains[1].items():
        np.testing.assert_array_equal(frozen[1][name], value)
    np.testing.assert_array_equal(run(frozen[0]), run(trains[0]))


def test_parameters_are_counted_as_the_author_knows_them() -> None:
    base = canonicalize(network())
    assert count_parameters(base) == 4 * 27 + 8 * 4 * 9 + 3 * 8 + 3  # the added zero biases left out


def test_a_plan_for_another_graph_is_refused() -> None:
    base = canonicalize(network())
    plan = METHODS["lora-c"](describe(base), LoraConfig(rank=1))
    values = starting_values(plan, base.values, seed=0)
    other = canonicalize(network()).model
    other.graph.initializers["body.weight"].name = "renamed"
    with pytest.raises(ConversionError, match=r"body\.weight"):
        inject(other, plan, values)


@pytest.mark.parametrize("name", [pytest.param("mobilenet_v2", marks=pytest.mark.long), "mobilenet_v3_small"])
def test_a_graph_and_its_module_give_the_same_facts(name: str) -> None:
    net = build(ModelSpec(name, classes=10))
    graph = export_graph(net, (3, 32, 32))
    facts = describe(canonicalize(graph), canonicalize(graph, fold=False))
    head = sum(p.numel() for k, p in net.named_parameters() if k.startswith(facts.head_weight[0].rsplit(".", 1)[0]))
    assert facts.backbone_parameters == sum(p.numel() for p in net.parameters()) - head
    full = METHODS["full"](facts, LoraConfig())
    weights = {k for k, p in net.named_parameters() if k.endswith(".weight") and p.ndim > 1}
    assert {t.name for t in full.trainables if t.role == "weight"} == weights
