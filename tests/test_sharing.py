"""Tensors of equal value that an exporter stored once get a copy for each reader; real ties stay."""

import numpy as np
import onnx_ir as ir
from exporter_graphs import Arrays, constants, from_text, image, numbers, outputs

from lorac_exporters.graph_tools import need
from lorac_exporters.sharing import is_weight, unshare

MAPS = "float[batch,3,8,8] y"


def readers(model: ir.Model) -> dict[str, list[tuple[str, int]]]:
    """Who reads each initializer: (output of the node, input index)."""
    return {
        name: sorted((need(use.node.outputs[0]).name, use.idx) for use in value.uses())
        for name, value in model.graph.initializers.items()
    }


def unshared(body: str, weights: Arrays) -> tuple[ir.Model, list[str]]:
    """The model after `unshare`, checked to compute the same."""
    model = from_text(body, weights=weights, y=MAPS)
    expected = outputs(model, image(2, 3, 8, 8))
    changes = unshare(model.graph)
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), expected)
    return model, changes


def test_a_shared_bias_becomes_one_for_each_convolution_named_after_it() -> None:
    weights = numbers(a_weight=(3, 3, 1, 1), b_weight=(3, 3, 1, 1), b_bias=(3,))
    model, changes = unshared("p = Conv (x, a.weight, b.bias) y = Conv (p, b.weight, b.bias)", weights)
    assert readers(model)["a.bias"] == [("p", 2)]
    assert readers(model)["b.bias"] == [("y", 2)]
    assert changes == ["a.bias: its own copy of b.bias, which several layers shared"]


def test_bn_tensors_merged_across_layers_and_within_one_are_separated_by_role() -> None:
    weights = numbers(a_weight=(3,), a_bias=(3,), b_running_mean=(3,), b_running_var=(3,))
    body = "p = BatchNormalization (x, a.weight, a.bias, a.bias, a.weight) "
    body += "y = BatchNormalization (p, a.weight, a.bias, b.running_mean, b.running_var)"
    weights["a.weight"] = np.abs(weights["a.weight"])
    model, _ = unshared(body, weights)
    found = readers(model)
    for name, output in (("a", "p"), ("b", "y")):
        for index, role in enumerate(("weight", "bias", "running_mean", "running_var"), start=1):
            assert found[f"{name}.{role}"] == [(output, index)]


def test_a_bn_without_a_tensor_of_its_own_is_named_after_its_convolution() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1), a_weight=(3,), a_bias=(3,), a_running_mean=(3,), a_running_var=(3,))
    tensors = "a.weight, a.bias, a.running_mean, a.running_var"
    body = f"p = BatchNormalization (x, {tensors}) q = Conv (p, c.weight) y = BatchNormalization (q, {tensors})"
    model, _ = unshared(body, weights)
    found = readers(model)
    assert found["c.bn.running_var"] == [("y", 4)]
    assert sum("running_var" in name for name in found) == 2


def test_a_weight_of_two_layers_stays_one_tensor_and_is_reported() -> None:
    weights = numbers(a_weight=(3, 3, 1, 1))
    model, changes = unshared("p = Conv (x, a.weight) y = Conv (p, a.weight)", weights)
    assert readers(model) == {"a.weight": [("p", 1), ("y", 1)]}
    assert changes == ["a.weight: shared by 2 layers, kept as one tensor"]


def test_a_weight_that_something_else_reads_too_is_the_layers_own() -> None:
    weights = numbers(a_weight=(3, 3, 1, 1))
    model, _ = unshared("p = Conv (x, a.weight) s = ReduceSum (a.weight) y = Mul (p, s)", weights)
    assert readers(model) == {"a.weight": [("p", 1)], "a.weight_1": [("s", 0)]}


def test_scalars_and_integers_may_be_shared() -> None:
    weights = constants(zero=0.0, six=6.0, axes=[2, 3])
    body = "p = Clip (x, zero, six) q = Clip (p, zero, six) m = ReduceMean (q, axes) n = ReduceMax (q, axes) "
    model, changes = unshared(body + "s = Add (m, n) y = Add (s, q)", weights)
    assert changes == []
    assert set(readers(model)) == {"zero", "six", "axes"}


def test_copies_do_not_share_memory() -> None:
    weights = numbers(a_weight=(3, 3, 1, 1), b_weight=(3, 3, 1, 1), b_bias=(3,))
    model, _ = unshared("p = Conv (x, a.weight, b.bias) y = Conv (p, b.weight, b.bias)", weights)
    first, second = (model.graph.initializers[name].const_value.numpy() for name in ("a.bias", "b.bias"))
    assert not np.shares_memory(first, second)


def test_both_factors_of_a_matrix_product_can_be_the_weight() -> None:
    product = ir.node("MatMul", [None, None])
    conv = ir.node("Conv", [None, None, None])
    assert [is_weight(product, i) for i in (0, 1)] == [True, True]
    assert [is_weight(conv, i) for i in (0, 1, 2)] == [False, True, False]
    assert not is_weight(ir.node("Conv", [None, None], domain="other"), 1)
