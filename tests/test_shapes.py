"""Shapes that depend on the batch only become constants, and the batch becomes free."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import assert_same, constants, from_text, image, numbers, outputs
from hypothesis import given
from hypothesis import strategies as st

from lorac_exporters.graph_tools import array, nodes_of
from lorac_exporters.shapes import fix_image_size, free_batch, merged_shape, settle_shapes, trace
from lorac_runtime.errors import ConversionError

MAPS = "float[batch,4,8,8] y"
FLATTENINGS = {
    "Shape, Gather, Unsqueeze, Concat": (
        "s = Shape (c) n = Gather (s, zero) u = Unsqueeze (n, first) t = Concat <axis = 0> (u, minus) "
        "y = Reshape (c, t)"
    ),
    "Shape, Slice, Concat": (
        "s = Shape (c) n = Slice (s, first, one) t = Concat <axis = 0> (n, minus) y = Reshape (c, t)"
    ),
    "Shape from 0 to 1": "n = Shape <start = 0, end = 1> (c) t = Concat <axis = 0> (n, minus) y = Reshape (c, t)",
    "arithmetic on sizes": (
        "s = Shape (c) n = Slice (s, first, one) a = Slice (s, one, four) p = ReduceProd (a) "
        "t = Concat <axis = 0> (n, p) y = Reshape (c, t)"
    ),
    "zero copies the batch": "y = Reshape (c, zero_minus)",
}
NUMBERS = constants(zero=0, first=[0], one=[1], four=[4], minus=[-1], zero_minus=[0, -1])


def flattening(name: str, x: str = "float[batch,3,8,8] x") -> ir.Model:
    weights = numbers(w=(4, 3, 1, 1)) | NUMBERS
    return from_text("c = Conv (x, w) " + FLATTENINGS[name], weights=weights, x=x, y="float[batch,256] y")


@pytest.mark.parametrize("name", FLATTENINGS)
def test_every_way_to_flatten_becomes_one_constant(name: str) -> None:
    model = flattening(name)
    expected = outputs(model, image(3, 3, 8, 8))
    changes = settle_shapes(model)
    assert [node.op_type for node in model.graph] == ["Conv", "Reshape"]
    assert array(model.graph[1].inputs[1]).tolist() == [-1, 256]
    assert any("[-1, 256]" in text for text in changes)
    np.testing.assert_array_equal(outputs(model, image(3, 3, 8, 8)), expected)
    assert settle_shapes(model) == []


@given(groups=st.sampled_from([1, 2, 4]), height=st.integers(2, 5), width=st.integers(2, 5))
def test_a_channel_shuffle_from_sizes_becomes_constant_for_all_sizes(groups: int, height: int, width: int) -> None:
    body = "s = Shape (x) n = Slice (s, first, one) hw = Slice (s, two, four) "
    body += "t = Concat <axis = 0> (n, split, hw) a = Reshape (x, t) b = Transpose <perm = [0, 2, 1, 3, 4]> (a) "
    body += "y = Reshape (b, s)"
    weights = NUMBERS | constants(two=[2], split=[groups, 4 // groups])
    sizes = f"float[batch,4,{height},{width}]"
    model = from_text(body, weights=weights, x=f"{sizes} x", y=f"{sizes} y")
    expected = outputs(model, image(3, 4, height, width))
    settle_shapes(model)
    targets = [array(node.inputs[1]).tolist() for node in nodes_of(model.graph, "Reshape")]
    assert targets == [[-1, groups, 4 // groups, height, width], [-1, 4, height, width]]
    np.testing.assert_array_equal(outputs(model, image(3, 4, height, width)), expected)


def test_other_inputs_computed_from_sizes_become_constant_too() -> None:
    body = "s = Shape (x) h = Slice (s, two, three) half = Div (h, two) y = Slice (x, first, half, two)"
    weights = NUMBERS | constants(two=[2], three=[3])
    model = from_text(body, weights=weights, y="float[batch,3,4,8] y")
    settle_shapes(model)
    assert [node.op_type for node in model.graph] == ["Slice"]
    np.testing.assert_array_equal(outputs(model, image(2, 3, 8, 8)), image(2, 3, 8, 8)[:, :, :4])


def test_weights_that_the_graph_computes_stay_computed() -> None:
    body = (
        "p = MatMul (b, a) r = Reshape (p, form) s = Mul (alpha, third) d = Mul (r, s) w = Add (k, d) y = Conv (x, w)"
    )
    weights = numbers(b=(4, 2), a=(2, 3), k=(4, 3, 1, 1), alpha=(1,), third=(1,)) | constants(form=[4, 3, 1, 1])
    model = from_text(body, weights=weights, y=MAPS)
    settle_shapes(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Reshape", "Mul", "Mul", "Add", "Conv"]
    assert all(node.outputs[0].shape is not None for node in model.graph)
    assert array(model.graph[1].inputs[1]).tolist() == [4, 3, 1, 1]


def test_values_get_their_shapes_with_the_batch_by_name() -> None:
    model = flattening("zero copies the batch")
    settle_shapes(model)
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[batch,4,8,8]", "[batch,256]"]


def test_a_batch_folded_into_another_axis_is_settled_and_its_size_left_open() -> None:
    weights = constants(mixed=[-1, 1, 8, 8], back=[-1, 3, 8, 8])
    model = from_text("a = Reshape (x, mixed) y = Reshape (a, back)", weights=weights, y="float[batch,3,8,8] y")
    settle_shapes(model)
    assert str(model.graph[0].outputs[0].shape) == "[None,1,8,8]"
    assert str(model.graph[1].outputs[0].shape) == "[batch,3,8,8]"


def test_a_target_computed_from_pixels_is_refused_by_name() -> None:
    body = "c = Conv (x, w) m = ReduceMax <keepdims = 0> (c) i = Cast <to = 7> (m) u = Unsqueeze (i, first) "
    body += "t = Concat <axis = 0> (u, minus) y = Reshape (c, t)"
    weights = numbers(w=(4, 3, 1, 1)) | NUMBERS
    model = from_text(body, weights=weights, y="float[n,k] y")
    with pytest.raises(ConversionError, match=r"Reshape .*: the target shape is computed from 't'"):
        settle_shapes(model)


def test_tracing_leaves_the_model_alone() -> None:
    model = flattening("Shape, Slice, Concat")
    before = [str(node) for node in model.graph]
    found = trace(model, 7)
    assert found.shapes["y"] == (7, 256)
    assert found.constants["t"].tolist() == [7, -1]
    assert [str(node) for node in model.graph] == before


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rest", [256, -1])
def test_a_fixed_batch_is_freed_also_where_a_reshape_holds_it(batch: int, rest: int) -> None:
    weights = numbers(w=(4, 3, 1, 1)) | {"t": np.array([batch, rest], np.int64)}
    sizes = {"x": f"float[{batch},3,8,8] x", "y": f"float[{batch},256] y"}
    model = from_text("c = Conv (x, w) y = Reshape (c, t)", weights=weights, **sizes)
    expected = outputs(model, image(batch, 3, 8, 8))
    changes = free_batch(model)
    settle_shapes(model)
    assert changes[0] == f"input 'x': the batch was fixed to {batch}, it is free now"
    assert_same(outputs(model, image(batch, 3, 8, 8)), expected, tolerance=1e-6)
    assert outputs(model, image(5, 3, 8, 8)).shape == (5, 256)
    assert str(model.graph.outputs[0].shape) == "[batch,256]"


def test_a_batch_of_another_name_is_renamed_and_one_that_is_right_is_not_mentioned() -> None:
    renamed = flattening("zero copies the batch", x="float[N,3,8,8] x")
    assert free_batch(renamed) == ["input 'x': the batch axis 'N' is called 'batch' now"]
    assert free_batch(renamed) == []


def test_shapes_of_different_rank_do_not_merge() -> None:
    assert merged_shape((2, 3), (3, 3, 1)) is None
    assert merged_shape(None, (3,)) is None
    assert merged_shape((2, 3), (3, 3)) == (None, 3)


@pytest.mark.parametrize("sizes", ["h,w", "8,w"])
def test_an_open_image_size_can_be_chosen(sizes: str) -> None:
    model = from_text("y = Relu (x)", weights={}, x=f"float[b,3,{sizes}] x", y="float[b,3,h,w] y")
    assert fix_image_size(model, (8, 10)) == ["input 'x': its size was open, it is (8, 10) now"]
    assert str(model.graph.inputs[0].shape) == "[b,3,8,10]"
    assert fix_image_size(model, (8, 10)) == []


@pytest.mark.parametrize("size", [(8,), (8, 9), (9, 8), (8, 8, 8)])
def test_a_fixed_image_size_cannot_be_changed(size: tuple[int, ...]) -> None:
    model = from_text("y = Relu (x)", weights={}, x="float[b,3,8,8] x", y="float[b,3,8,8] y")
    with pytest.raises(ConversionError, match="not of size"):
        fix_image_size(model, size)


EXPANDED = """
    s = Shape <start = 0, end = 1> (x)
    rest = Constant <value_ints = [8, 4, 4]> ()
    target = Concat <axis = 0> (s, rest)
    gate = ReduceMean <keepdims = 1> (x, axes)
    wide = Expand (gate, target)
    y = Mul (x, wide)
"""


def test_an_expand_to_the_size_of_the_batch_gets_a_constant_target() -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 18]> g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y)
        <int64[2] axes = {{2, 3}}> {{ {EXPANDED} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    x = np.random.default_rng(0).standard_normal((3, 8, 4, 4)).astype(np.float32)
    before = outputs(model, x)
    settle_shapes(model)
    assert [node.op_type for node in model.graph if node.op_type in ("Shape", "Concat")] == []
    target = next(node for node in model.graph if node.op_type == "Expand").inputs[1]
    assert target is not None
    assert target.const_value is not None
    assert target.const_value.numpy().tolist() == [1, 8, 4, 4]
    np.testing.assert_array_equal(outputs(model, x), before)


def test_an_expand_that_makes_the_batch_keeps_its_computed_target() -> None:
    body = EXPANDED.replace("gate = ReduceMean <keepdims = 1> (x, axes)", "gate = Identity (w)")
    text = f"""<ir_version: 9, opset_import: ["" : 18]> g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y)
        <float[1, 8, 1, 1] w = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ {body} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    settle_shapes(model)
    assert "Concat" in [node.op_type for node in model.graph]
    assert outputs(model, np.ones((2, 8, 4, 4), np.float32)).shape == (2, 8, 4, 4)
