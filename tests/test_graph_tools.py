"""Helpers for graph passes."""

import numpy as np
import onnx_ir as ir
import pytest
from exporter_graphs import constants, from_text, image, numbers, outputs

from lorac_exporters import graph_tools as gt
from lorac_runtime.errors import OutputError


def relu_twice() -> ir.Model:
    return from_text("a = Relu (x) b = Add (a, one) y = Relu (b)", weights=constants(one=1.0), y="float[batch,3,8,8] y")


def test_a_constant_is_registered_under_its_name_with_dtype_and_shape() -> None:
    graph = relu_twice().graph
    value = gt.constant(graph, "fc.weight", np.ones((2, 3), np.float32))
    assert graph.initializers["fc.weight"] is value
    assert (value.dtype, gt.static_dims(value)) == (ir.DataType.FLOAT, (2, 3))
    np.testing.assert_array_equal(gt.float_array(value), np.ones((2, 3)))


@pytest.mark.parametrize("name", ["x", "one", "a", "y"])
def test_a_constant_may_not_take_the_name_of_any_other_value(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        gt.constant(relu_twice().graph, name, 1.0)


def test_numbers_of_a_computed_value_are_unknown() -> None:
    value = relu_twice().graph[0].outputs[0]
    assert gt.array(value) is None
    with pytest.raises(ValueError, match="'a' is computed"):
        gt.float_array(value)


def test_setting_an_array_keeps_the_name_and_the_readers() -> None:
    model = relu_twice()
    one = model.graph.initializers["one"]
    gt.set_array(one, np.full((1, 3, 1, 1), 2.0, np.float32))
    assert gt.static_dims(one) == (1, 3, 1, 1)
    x = image(2, 3, 8, 8)
    np.testing.assert_array_equal(outputs(model, x), np.maximum(x, 0) + 2)


def test_bypassing_the_last_node_keeps_the_name_of_the_output() -> None:
    model = relu_twice()
    gt.bypass(model.graph[2])
    assert [n.op_type for n in model.graph] == ["Relu", "Add"]
    assert model.graph.outputs[0].name == "y"
    assert model.graph[1].outputs[0] is model.graph.outputs[0]


def test_a_replaced_node_leaves_name_and_shape_to_its_successor() -> None:
    model = relu_twice()
    last = model.graph[2]
    tanh = ir.node("Tanh", list(last.inputs))
    gt.replace_node(last, [tanh], tanh.outputs[0])
    x = image(2, 3, 8, 8)
    np.testing.assert_allclose(outputs(model, x), np.tanh(np.maximum(x, 0) + 1), rtol=1e-6)
    assert model.graph.outputs[0].shape == ir.Shape(["batch", 3, 8, 8])


def test_consumers_come_in_graph_order_with_every_input_index() -> None:
    model = from_text("a = Mul (x, x) y = Add (a, x)", weights={}, y="float[batch,3,8,8] y")
    uses = [(node.op_type, index) for node, index in gt.consumers(model.graph.inputs[0])]
    assert uses == [("Mul", 0), ("Mul", 1), ("Add", 1)]


def test_convolutions_with_computed_weights_are_left_out() -> None:
    weights = numbers(one=(4, 3, 1, 1))
    model = from_text("w = Relu (one) a = Conv (x, one) y = Conv (x, w)", weights=weights, y="float[b,4,8,8] y")
    assert [node.outputs[0].name for node in gt.convolutions(model.graph)] == ["a"]


def test_a_float_attribute_reads_as_the_decimal_that_was_meant() -> None:
    node = ir.node("BatchNormalization", [None], {"momentum": float(np.float32(0.9))})
    assert gt.float_attribute(node, "momentum", 0.0) == 0.9
    assert gt.float_attribute(node, "epsilon", 1e-5) == 1e-5


def test_an_input_left_out_at_the_end_can_be_connected() -> None:
    graph = from_text("y = Conv (x, w)", weights=numbers(w=(5, 3, 1, 1)), y="float[b,5,8,8] y").graph
    conv = graph[0]
    assert gt.input_at(conv, 2) is None
    bias = gt.constant(graph, "bias", np.zeros(5, np.float32))
    gt.set_input(conv, 2, bias)
    assert gt.input_at(conv, 2) is bias


def test_saving_into_a_missing_folder_is_an_output_error(tmp_path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        gt.save(relu_twice(), tmp_path / "none" / "m.onnx")
    gt.save(relu_twice(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == gt.to_bytes(relu_twice())
