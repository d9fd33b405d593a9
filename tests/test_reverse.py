"""Reverse mode over a graph: which nodes it walks, how gradients meet, what it refuses; and the tape it writes on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import check, graph_of, normal, run
from torch.nn import functional

from lorac_exporters.gradients.reverse import differentiate, path
from lorac_exporters.gradients.rule import Site
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import array, name_of, nodes_of
from lorac_runtime.errors import ConversionError

X, W = normal(3, 4), normal(4, 5, seed=1)


def named(model: ir.Model) -> dict[str, ir.Value]:
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return {name_of(value): value for value in values}


def model(body: str, **inputs: np.ndarray) -> tuple[ir.Model, dict[str, ir.Value]]:
    found = graph_of(body, inputs)
    return found, named(found)


def test_the_gradients_of_all_ways_to_a_value_are_summed() -> None:
    check(
        "a = Mul (x, x)  b = Sigmoid (x)  c = Mul (a, b)  d = Add (c, x)  y = Mul (d, x)",
        {"x": X},
        lambda x: (x * x * torch.sigmoid(x) + x) * x,
    )


def test_an_input_that_a_node_reads_twice_gets_both_gradients() -> None:
    check("y = MatMul (x, x)", {"x": normal(4, 4)}, lambda x: x @ x, batch=False)


def test_values_inside_the_graph_can_be_asked_for_with_those_below_them() -> None:
    graph, values = model("a = Tanh (x)  b = MatMul (a, w)  y = Mul (b, b)", x=X, w=W)
    wanted = [values[name] for name in ("x", "a", "w", "b")]
    graph.graph.outputs[:] = differentiate(Tape(graph.graph), values["y"], wanted, seed=values["y"])
    x, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (X, W))
    a = torch.tanh(x)
    b = a @ w
    expected = torch.autograd.grad((b * b).square().sum() / 2, [x, a, w, b])
    for found, gradient in zip(run(graph, {"x": X, "w": W}), expected, strict=True):
        np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_scalar_needs_no_seed() -> None:
    graph, values = model("s = Mul (x, x)  y = ReduceSum <keepdims = 0> (s)", x=X)
    graph.graph.outputs[:] = differentiate(Tape(graph.graph), values["y"], [values["x"], values["y"]])
    gradient, one = run(graph, {"x": X})
    np.testing.assert_allclose(gradient, 2 * X, rtol=1e-6)
    assert (one.shape, float(one)) == ((), 1.0)


def test_outputs_that_the_loss_does_not_use_have_no_part_in_it() -> None:
    check(
        "a, b, c = Split <axis = 1, num_outputs = 3> (x)  unused = Exp (b)  y = Mul (a, c)",
        {"x": normal(2, 6)},
        lambda x: x[:, :2] * x[:, 4:],
    )


def test_only_nodes_between_sources_and_target_are_on_the_path() -> None:
    body = "a = Relu (x)  b = Tanh (w)  c = Neg (a)  side = Exp (c)  d = Add (c, b)  y = Abs (d)"
    graph, values = model(body, x=X, w=X)
    between = {
        ("x",): ["Relu", "Neg", "Add", "Abs"],
        ("w",): ["Tanh", "Add", "Abs"],
        ("c",): ["Add", "Abs"],
        ("x", "w"): ["Relu", "Tanh", "Neg", "Add", "Abs"],
        ("y",): [],
    }
    for sources, expected in between.items():
        nodes = path(graph.graph, values["y"], [values[name] for name in sources])
        assert [node.op_type for node in nodes] == expected


def test_sizes_and_masks_end_a_path() -> None:
    body = """
        size = Shape (x)  flat = Reshape (w, size)  above = Greater (x, flat)  mask = Cast <to = 1> (above)
        y = Mul (x, mask)
    """
    graph, values = model(body, x=X, w=normal(12, seed=2))
    assert [n.op_type for n in path(graph.graph, values["y"], [values["x"]])] == ["Mul"]
    assert path(graph.graph, values["y"], [values["w"]]) == []


def test_all_nodes_without_a_rule_are_named_before_anything_is_written() -> None:
    graph, values = model("a = Round (x)  b = Floor (w)  side = Ceil (x)  c = Add (a, b)  y = Sign (c)", x=X, w=X)
    before = len(graph.graph)
    with pytest.raises(ConversionError, match=r"(?s)no gradient rule.*Round.*Floor.*Sign") as caught:
        differentiate(Tape(graph.graph), values["y"], [values["x"], values["w"]], seed=values["y"])
    assert "Ceil" not in str(caught.value)
    assert len(graph.graph) == before


def test_an_operator_of_another_domain_is_not_taken_for_the_standards() -> None:
    graph, values = model("a = Relu (x)  y = Neg (a)", x=X)
    nodes_of(graph.graph, "Relu")[0].domain = "com.example"
    with pytest.raises(ConversionError, match="Relu"):
        differentiate(Tape(graph.graph), values["y"], [values["x"]], seed=values["y"])


def test_a_node_off_the_path_needs_no_rule() -> None:
    check(
        "r = Round (x)  y = Mul (w, r)", {"x": X, "w": X + 1}, lambda x, w: w * x.round(), wrt=["w"], differences=False
    )


def test_all_values_that_the_loss_does_not_depend_on_are_named() -> None:
    graph, values = model("y = Relu (x)  one = Neg (w)  two = Exp (v)", x=X, w=W, v=W)
    with pytest.raises(ConversionError, match=r"(?s)no gradient reaches these tensors.*- w\n.*- two") as caught:
        differentiate(Tape(graph.graph), values["y"], [values[n] for n in ("x", "w", "two")], seed=values["y"])
    assert "- x" not in str(caught.value)


def test_a_value_whose_gradient_a_rule_leaves_out_is_named_too() -> None:
    graph, values = model("y = Relu (x)", x=X)
    rules = {"Relu": lambda tape, site: [None]}
    with pytest.raises(ConversionError, match="- x"):
        differentiate(Tape(graph.graph), values["y"], [values["x"]], seed=values["y"], rules=rules)


def test_a_rule_is_told_what_is_wanted_and_what_reaches_each_output() -> None:
    graph, values = model("a, b = Split <axis = 1, num_outputs = 2> (x)  c = MatMul (a, w)  y = Relu (c)", x=X, w=W[:2])
    seen: dict[str, Site] = {}

    def watched(op_type: str):  # type: ignore[no-untyped-def]
        def rule(tape: Tape, site: Site):  # type: ignore[no-untyped-def]
            seen[op_type] = site
            return RULES[op_type](tape, site)

        return rule

    rules = {op_type: watched(op_type) for op_type in ("Split", "MatMul", "Relu")}
    differentiate(Tape(graph.graph), values["y"], [values["x"]], seed=values["y"], rules=rules)
    assert [grad is not None for grad in seen["Split"].grads] == [True, False]
    assert seen["MatMul"].needs == (True, False)
    assert not seen["MatMul"].wants(5)
    assert seen["Relu"].grad is values["y"]


def test_gradients_of_strided_convolutions_are_summed_before_they_are_interleaved() -> None:
    """The block of a ResNet that halves the resolution: 3x3 and 1x1 beside each other, both of stride 2."""
    inputs = {"x": normal(2, 3, 6, 7), "v": normal(4, 3, 3, 3, seed=1), "w": normal(4, 3, 1, 1, seed=2)}
    body = "a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, v)  b = Conv <strides = [2, 2]> (x, w)  y = Add (a, b)"

    def reference(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, v, stride=2, padding=1) + functional.conv2d(x, w, stride=2)

    check(body, inputs, reference)
    graph = graph_of(body, inputs)
    values = named(graph)
    differentiate(Tape(graph.graph), values["y"], [values["x"]], seed=values["y"])
    assert sum(name_of(node.outputs[0]).startswith("interleaved") for node in graph.graph) == 3  # two axes: 2 + 1


def test_gradients_of_other_strides_and_of_no_stride_meet() -> None:
    inputs = {"x": normal(1, 2, 6, 6), "v": normal(2, 2, 3, 3, seed=1), "w": normal(2, 2, 2, 2, seed=2)}
    body = """
        a = Conv <strides = [2, 3]> (x, v)  b = Conv <strides = [3, 2]> (x, w)  c = Relu (x)
        p = GlobalAveragePool (a)  q = GlobalAveragePool (b)  r = Mul (p, q)  y = Mul (c, r)
    """

    def reference(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a, b = functional.conv2d(x, v, stride=(2, 3)), functional.conv2d(x, w, stride=(3, 2))
        return torch.relu(x) * a.mean((2, 3), keepdim=True) * b.mean((2, 3), keepdim=True)

    check(body, inputs, reference, differences=False)


def tape() -> Tape:
    x = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    return Tape(ir.Graph([x], [], nodes=[], opset_imports={"": 18}))


def test_equal_constants_are_stored_once_and_others_kept_apart() -> None:
    t = tape()
    first = t.constant(np.float32(1))
    assert t.constant(np.float32(1)) is first
    others = [np.float64(1), np.int64(1), np.float32([1]), np.float32([[1]]), np.float32(2)]
    assert len({id(v) for v in (first, *(t.constant(o) for o in others))}) == len(t.graph.initializers) == 6
    assert t.constant(np.float32(-0.0)) is not t.constant(np.float32(0.0))  # 1 / x would tell them apart


def test_a_constant_that_is_given_a_name_is_a_tensor_of_its_own() -> None:
    t = tape()
    shared = t.constant(np.zeros(3, np.float32))
    own = t.constant(np.zeros(3, np.float32), "conv.lora_a")
    assert own is not shared
    assert t.graph.initializers["conv.lora_a"] is own


def test_a_constant_keeps_its_shape_and_numbers() -> None:
    for numbers in (np.float32(3), np.arange(6, dtype=np.int64).reshape(2, 3), np.ones((2, 3), np.float32).T):
        value = tape().constant(numbers)
        assert dims(value) == numbers.shape
        np.testing.assert_array_equal(array(value), numbers)


def test_names_are_never_used_twice() -> None:
    t = tape()
    t.constant(np.float32(5), "relu_1")
    x = t.graph.inputs[0]
    names = [t.op("Relu", x, like=x).name for _ in range(3)] + [t.op("Neg", x, like=x, name="x").name]
    assert names == ["relu", "relu_2", "relu_3", "x_1"]


def test_a_prefix_stands_before_every_name() -> None:
    graph = tape().graph
    assert Tape(graph, "grad.").op("Relu", graph.inputs[0], like=graph.inputs[0]).name == "grad.relu"


def test_an_output_has_the_shape_and_type_that_are_said() -> None:
    t = tape()
    x = t.graph.inputs[0]
    above = t.op("Greater", x, 0.0, like=x, dtype=ir.DataType.BOOL)
    assert (dims(above), above.dtype) == (("batch", 8), ir.DataType.BOOL)
    assert (dims(t.op("Not", above, like=above)), t.op("Not", above, like=above).dtype) == (("batch", 8), above.dtype)
    assert dims(t.op("ReduceSum", x, shape=())) == ()
    first, second = t.multi_op("Split", [x, t.ints(3, 5)], [("batch", 3), ("batch", 5)])
    assert (dims(first), dims(second), first.name == second.name) == (("batch", 3), ("batch", 5), False)


def test_an_initializer_can_become_an_input() -> None:
    t = tape()
    weight = t.constant(np.ones((2, 3), np.float32), "fc.weight")
    y = t.op("MatMul", weight, weight, shape=(2, 3))
    assert t.input("fc.weight", (2, 3)) is weight
    assert (weight.const_value, weight in t.graph.inputs, y.producer().inputs[0]) == (None, True, weight)
    assert "fc.weight" not in t.graph.initializers


def test_sizes_must_be_known_where_numbers_are_asked_for() -> None:
    x = tape().graph.inputs[0]
    assert sizes(x, 1) == (8,)
    with pytest.raises(ValueError, match=r"'x' has sizes \('batch', 8\), expected numbers from axis 0"):
        sizes(x)
    with pytest.raises(ValueError, match="the shape of 'bare' is not known"):
        dims(ir.Value(name="bare"))
