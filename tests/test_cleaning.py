"""Equal-value clean-up, step by step."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import constants, from_text, image, numbers, outputs

from lorac_exporters import cleaning
from lorac_exporters.graph_tools import array, int_attribute
from lorac_exporters.shapes import settle_shapes

MAPS = "float[batch,4,8,8] y"
WEIGHTS = numbers(c_weight=(4, 3, 1, 1), c_bias=(4,))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_functions_are_written_out() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "local": 1]>
    g (float[batch,4,8,8] x) => (float[batch,4,8,8] y) { a = local.silu (x) y = local.silu (a) }
    <domain: "local", opset_import: ["": 18]> silu (z) => (r) { s = Sigmoid (z) r = Mul (z, s) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    expected = outputs(model, image(2, 4, 8, 8))
    assert cleaning.inline_functions(model) == ["functions written out as nodes: silu"]
    assert operators(model) == ["Sigmoid", "Mul"] * 2
    assert not model.functions
    np.testing.assert_array_equal(outputs(model, image(2, 4, 8, 8)), expected)
    assert cleaning.inline_functions(model) == []


def test_initializers_are_taken_from_the_inputs() -> None:
    model = from_text("y = Conv (x, c.weight)", weights=WEIGHTS, y=MAPS)
    model.graph.inputs.append(model.graph.initializers["c.weight"])
    assert cleaning.own_initializers(model) == ["1 initializers are no longer graph inputs"]
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert array(model.graph.initializers["c.weight"]).shape == (4, 3, 1, 1)
    assert cleaning.own_initializers(model) == []


def test_constants_of_all_kinds_become_initializers() -> None:
    body = "one = Constant <value_float = 1.0> () two = Add (one, one) t = Transpose <perm = [1, 0, 2, 3]> (w) "
    body += "a = Conv (x, t) y = Mul (a, two)"
    model = from_text(body, weights=numbers(w=(3, 4, 1, 1)), y=MAPS)
    expected = outputs(model, image(2, 3, 8, 8))
    assert cleaning.fold_constants(model) == ["3 nodes computed constants: folded into initializers"]
    assert operators(model) == ["Conv", "Mul"]
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), expected)


def test_a_large_weight_is_folded_too() -> None:
    model = from_text("t = Neg (w) f = Flatten (x) y = MatMul (f, t)", weights=numbers(w=(192, 300)))
    cleaning.fold_constants(model)
    assert operators(model) == ["Flatten", "MatMul"]


def test_identity_and_dropout_vanish_also_at_the_output() -> None:
    body = "a = Identity (x) b = Conv (a, c.weight) d, mask = Dropout (b) y = Identity (d)"
    model = from_text(body, weights=WEIGHTS, y=MAPS)
    expected = outputs(model, image(2, 3, 8, 8))
    assert len(cleaning.drop_idle_nodes(model)) == 3
    assert operators(model) == ["Conv"]
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), expected)


def test_a_copy_of_an_initializer_becomes_an_initializer_of_its_own() -> None:
    body = "d.bias = Identity (c.bias) a = Conv (x, c.weight, c.bias) y = Conv (a, d.weight, d.bias)"
    model = from_text(body, weights=WEIGHTS | numbers(d_weight=(4, 4, 1, 1)), y=MAPS)
    expected = outputs(model, image(2, 3, 8, 8))
    changes = cleaning.unmerge_copies(model)
    assert changes == ["d.bias: its own copy of c.bias, with which it was merged"]
    assert operators(model) == ["Conv", "Conv"]
    np.testing.assert_array_equal(array(model.graph.initializers["d.bias"]), WEIGHTS["c.bias"])
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), expected)


@pytest.mark.parametrize(("cells", "kept"), [(0, 0), (1, 1)])
def test_only_padding_that_pads_nothing_vanishes(cells: int, kept: int) -> None:
    weights = constants(pads=[0, 0, cells, 0, 0, 0, 0, 0])
    model = from_text("p = Pad (x, pads) y = Relu (p)", weights=weights, y=f"float[batch,3,{8 + cells},8] y")
    settle_shapes(model)
    assert len(cleaning.drop_idle_pads(model)) == 1 - kept
    assert operators(model).count("Pad") == kept


def test_missing_biases_are_zeros_and_existing_ones_stay() -> None:
    body = "a = Conv (x, c.weight, c.bias) y = Conv (a, d.weight)"
    model = from_text(body, weights=WEIGHTS | numbers(d_weight=(4, 4, 1, 1)), y=MAPS)
    expected = outputs(model, image(2, 3, 8, 8))
    assert cleaning.add_biases(model.graph) == ["d.bias"]
    np.testing.assert_array_equal(array(model.graph.initializers["d.bias"]), np.zeros(4))
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), expected)


def test_a_bias_never_takes_the_name_of_another_tensor() -> None:
    weights = numbers(c_weight=(4, 3, 1, 1)) | {"c.bias": np.ones((4, 1, 1), np.float32)}
    model = from_text("a = Conv (x, c.weight) y = Add (a, c.bias)", weights=weights, y=MAPS)
    assert cleaning.add_biases(model.graph) == ["c.bias_1"]


def test_node_names_become_unique_and_good_ones_are_kept() -> None:
    model = from_text("a = Relu (x) b = Neg (a) c = Abs (b) y = Exp (c)", weights={}, y="float[batch,3,8,8] y")
    for node, name in zip(model.graph, ["", "twice", "twice", "Relu_0"], strict=True):
        node.name = name
    assert cleaning.unique_node_names(model.graph) == [
        "2 nodes had no name of their own: named by operator and position"
    ]
    assert [node.name for node in model.graph] == ["Relu_0_1", "twice", "Abs_2", "Relu_0"]
    assert cleaning.unique_node_names(model.graph) == []


def test_kernel_sizes_come_from_the_weight_where_the_attribute_is_missing() -> None:
    weights = numbers(w=(4, 3, 2, 3))
    graph = from_text(
        "a = Conv (x, w) y = MaxPool <kernel_shape = [3, 1]> (a)", weights=weights, y="float[b,4,h,v] y"
    ).graph
    assert [cleaning.window(node) for node in graph] == [(2, 3), (3, 1)]


def test_stripping_writes_raw_bytes_and_attributes_in_order() -> None:
    proto = ir.to_proto(from_text("y = Conv <strides = [1, 1], group = 1> (x, c.weight)", weights={}, y=MAPS))
    values = WEIGHTS["c.weight"].ravel().tolist()
    proto.graph.initializer.append(onnx.helper.make_tensor("c.weight", 1, (4, 3, 1, 1), values))
    assert not proto.graph.initializer[0].raw_data
    model = ir.from_proto(proto)
    cleaning.strip(model)
    result = ir.to_proto(model)
    assert result.graph.initializer[0].raw_data == WEIGHTS["c.weight"].tobytes()
    assert [a.name for a in result.graph.node[0].attribute] == ["group", "strides"]
    assert int_attribute(model.graph[0], "group", 0) == 1
    assert result.ir_version == 9
