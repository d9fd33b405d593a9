"""Batch normalisation folded into convolutions, or written as Mul + Add; the function computed stays the same."""

import numpy as np
import onnx_ir as ir
import pytest
from exporter_graphs import assert_same, from_text, image, numbers, outputs
from hypothesis import given
from hypothesis import strategies as st

from lorac_exporters.batchnorm import find_batchnorms, fold_batchnorms
from lorac_exporters.canonical import canonicalize
from lorac_exporters.graph_tools import float_array, nodes_of
from lorac_runtime.errors import ConversionError

HEAD = "g = GlobalAveragePool (last) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"


def bn(name: str, channels: int) -> dict[str, np.ndarray]:
    shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,))
    arrays = numbers(**{f"{name}_{k}": v for k, v in shapes.items()})
    arrays[f"{name}.weight"][0] = 0.0
    return arrays


def head(features: int) -> dict[str, np.ndarray]:
    return numbers(fc_weight=(5, features), fc_bias=(5,))


def bn_node(name: str, x: str, y: str, attributes: str = "") -> str:
    tensors = ", ".join(f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var"))
    return f"{y} = BatchNormalization {attributes} ({x}, {tensors}) "


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]),
    biased=st.booleans(),
)
def test_a_convolution_absorbs_its_bn_for_all_shapes(kernel, stride, dilation, pads, groups, width, biased) -> None:
    weights = numbers(c_weight=(width, 4 // groups, *kernel), c_bias=(width,)) | bn("n", width) | head(width)
    attributes = (
        f"<group = {groups}, strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}], pads = {pads}>"
    )
    bias = ", c.bias" if biased else ""
    if not biased:
        del weights["c.bias"]
    body = f"a = Conv {attributes} (x, c.weight{bias}) " + bn_node("n", "a", "last") + HEAD
    model = from_text(body, weights=weights, x="float[batch,4,9,9] x")
    folded = canonicalize(model)
    assert operators(folded.model) == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    assert folded.batchnorms[0].folded_into == ("c.weight", "c.bias")
    x = image(2, 4, 9, 9)
    assert_same(outputs(folded.model, x), outputs(model, x))


def test_a_one_dimensional_convolution_absorbs_its_bn() -> None:
    weights = numbers(c_weight=(6, 3, 3)) | bn("n", 6) | head(6)
    body = "a = Conv <pads = [1, 1]> (x, c.weight) " + bn_node("n", "a", "last") + HEAD
    model = from_text(body, weights=weights, x="float[batch,3,12] x")
    folded = canonicalize(model)
    assert "BatchNormalization" not in operators(folded.model)
    assert folded.batchnorms[0].positions == 12
    assert_same(outputs(folded.model, image(3, 3, 12)), outputs(model, image(3, 3, 12)))


UNABSORBED = {
    "before the convolution": (bn_node("n", "x", "z") + "last = Conv (z, c.weight) ", 3),
    "after an activation": ("a = Conv (x, c.weight) r = Relu (a) " + bn_node("n", "r", "last"), 4),
    "where another node reads the convolution too": (
        "a = Conv (x, c.weight) " + bn_node("n", "a", "z") + "last = Add (z, a) ",
        4,
    ),
    "after a sum": ("a = Conv (x, c.weight) s = Add (a, a) " + bn_node("n", "s", "last"), 4),
}


@pytest.mark.parametrize("place", UNABSORBED)
def test_a_bn_that_no_convolution_can_absorb_becomes_mul_and_add(place: str) -> None:
    body, channels = UNABSORBED[place]
    weights = numbers(c_weight=(4, 3, 1, 1)) | bn("n", channels) | head(4)
    model = from_text(body + HEAD, weights=weights)
    folded = canonicalize(model)
    assert "BatchNormalization" not in operators(folded.model)
    record = folded.batchnorms[0]
    assert (record.affine, record.folded_into) == (True, ("n.weight", "n.bias"))
    assert folded.values["n.weight"].shape == folded.values["n.bias"].shape == (1, channels, 1, 1)
    assert not {"n.running_mean", "n.running_var"} & folded.values.keys()
    assert_same(outputs(folded.model, image(2, 3, 8, 8)), outputs(model, image(2, 3, 8, 8)))


def test_a_transposed_convolution_is_left_as_it_is() -> None:
    weights = numbers(c_weight=(4, 3, 1, 1), t_weight=(4, 2, 2, 2)) | bn("n", 2) | head(2)
    body = "a = Conv (x, c.weight) t = ConvTranspose (a, t.weight) " + bn_node("n", "t", "last") + HEAD
    model = from_text(body, weights=weights)
    folded = canonicalize(model)
    np.testing.assert_array_equal(folded.values["t.weight"], weights["t.weight"])
    assert folded.batchnorms[0].affine
    assert_same(outputs(folded.model, image(2, 3, 8, 8)), outputs(model, image(2, 3, 8, 8)))


def test_two_layers_that_share_a_weight_keep_it_and_scale_behind() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1)) | bn("n", 3) | bn("m", 3) | head(3)
    body = "a = Conv (x, c.weight) " + bn_node("n", "a", "b") + "c = Conv (b, c.weight) " + bn_node("m", "c", "last")
    model = from_text(body + HEAD, weights=weights)
    folded = canonicalize(model)
    assert [record.affine for record in folded.batchnorms] == [True, True]
    np.testing.assert_array_equal(folded.values["c.weight"], weights["c.weight"])
    assert_same(outputs(folded.model, image(2, 3, 8, 8)), outputs(model, image(2, 3, 8, 8)))


def test_folded_numbers_are_the_formulas() -> None:
    weights = numbers(c_weight=(4, 3, 3, 3), c_bias=(4,)) | bn("n", 4) | head(4)
    body = "a = Conv (x, c.weight, c.bias) " + bn_node("n", "a", "last", "<epsilon = 0.01>") + HEAD
    values = canonicalize(from_text(body, weights=weights)).values
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    g = w["n.weight"] / np.sqrt(w["n.running_var"] + 0.01)
    expected = (w["c.bias"] - w["n.running_mean"]) * g + w["n.bias"]
    np.testing.assert_allclose(values["c.weight"], w["c.weight"] * g[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(values["c.bias"], expected, rtol=1e-5, atol=1e-7)
    assert not values["c.weight"][0].any()  # the channel whose gamma is exactly zero


def test_records_hold_pytorch_momentum_names_and_sizes() -> None:
    weights = numbers(c_weight=(4, 3, 3, 3)) | bn("n", 4) | head(4)
    body = "a = Conv (x, c.weight) " + bn_node("n", "a", "last", "<momentum = 0.97, epsilon = 0.001>") + HEAD
    for fold in (True, False):
        (record,) = canonicalize(from_text(body, weights=weights), fold=fold).batchnorms
        assert (record.name, record.momentum, record.eps, record.positions) == ("n", 0.03, 0.001, 36)
        assert (record.weight, record.bias) == ("n.weight", "n.bias")
        assert (record.running_mean, record.running_var) == ("n.running_mean", "n.running_var")
        assert (record.folded_into, record.affine) == (("c.weight", "c.bias"), False)


def test_without_folding_the_nodes_and_their_numbers_stay() -> None:
    weights = numbers(c_weight=(4, 3, 3, 3)) | bn("n", 4) | head(4)
    model = from_text("a = Conv (x, c.weight) " + bn_node("n", "a", "last") + HEAD, weights=weights)
    kept = canonicalize(model, fold=False)
    assert len(nodes_of(kept.model.graph, "BatchNormalization")) == 1
    for name, expected in weights.items():
        np.testing.assert_array_equal(kept.values[name], expected)
    np.testing.assert_array_equal(kept.values["c.bias"], np.zeros(4))


def test_a_damaged_variance_is_refused_by_name() -> None:
    weights = numbers(c_weight=(4, 3, 3, 3)) | bn("n", 4) | head(4)
    weights["n.running_var"][2] = -1.0
    model = from_text("a = Conv (x, c.weight) " + bn_node("n", "a", "last") + HEAD, weights=weights)
    with pytest.raises(ConversionError, match=r"n\.running_var goes down to -1"):
        canonicalize(model)


def test_parameters_that_the_graph_computes_are_refused() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1)) | bn("n", 3) | head(3)
    body = "m = GlobalAveragePool (x) q = Flatten (m) r = ReduceMax <keepdims = 0> (q, zero) "
    body += "a = Conv (x, c.weight) last = BatchNormalization (a, r, n.bias, n.running_mean, n.running_var) "
    weights["zero"] = np.array([0], np.int64)
    with pytest.raises(ConversionError, match="computed in the graph"):
        canonicalize(from_text(body + HEAD, weights=weights))


def test_finding_does_not_change_the_graph_and_folding_does() -> None:
    weights = numbers(c_weight=(4, 3, 3, 3), c_bias=(4,)) | bn("n", 4) | head(4)
    body = "a = Conv (x, c.weight, c.bias) " + bn_node("n", "a", "last") + HEAD
    graph = canonicalize(from_text(body, weights=weights), fold=False).model.graph
    before = float_array(graph.initializers["c.weight"]).copy()
    sites = find_batchnorms(graph)
    np.testing.assert_array_equal(float_array(graph.initializers["c.weight"]), before)
    assert fold_batchnorms(sites) == ["BatchNormalization n: folded into c.weight and c.bias"]
    assert np.abs(float_array(graph.initializers["c.weight"]) - before).max() > 0.1
