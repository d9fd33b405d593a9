"""Reshape, Transpose and moves of data: the numbers of onnxruntime, without operators that storage does not need."""

from __future__ import annotations

import math

import gradient_cases
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, assert_close, check, graph, kinds, network_of, normal
from tflite_runtimes import answers

from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.tflite.shaping import groups_of
from lorac_runtime.errors import ConversionError

X = {"x": normal(1, 6, 4, 5)}
Shape = tuple[int, ...]


def ints(**values: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.int64) for name, value in values.items()}


def test_a_channel_shuffle_costs_one_transposition_between_two_reshapes() -> None:
    body = "a = Reshape (x, split) t = Transpose <perm = [0, 2, 1, 3, 4]> (a) y = Reshape (t, joined)"
    network = check(body, X | ints(split=[-1, 2, 3, 4, 5], joined=[-1, 6, 4, 5]), runtimes=EVERYWHERE)
    assert kinds(network) == ["RESHAPE", "TRANSPOSE", "RESHAPE"]


def test_transpositions_alone_cost_nothing_but_the_order_of_the_output() -> None:
    assert kinds(check("t = Transpose <perm = [0, 2, 3, 1]> (x) y = Transpose <perm = [0, 3, 1, 2]> (t)", X)) == []
    assert kinds(check("y = Transpose <perm = [0, 3, 2, 1]> (x)", X)) == ["TRANSPOSE"]


def test_pixels_become_a_sequence_without_transposition() -> None:
    body = "r = Reshape (x, rows) y = Transpose <perm = [0, 2, 1]> (r)"
    assert kinds(check("y = Reshape (x, rows)", X | ints(rows=[-1, 6, 20]))) == ["RESHAPE"]
    network = check(
        f"{body.replace('y =', 't =')} e = Exp (t) y = Transpose <perm = [0, 2, 1]> (e)", X | ints(rows=[-1, 6, 20])
    )
    assert kinds(network) == ["RESHAPE", "EXP"]


def test_joined_axes_that_do_not_lie_together_are_transposed_first() -> None:
    network = check("y = Reshape (x, flat)", X | ints(flat=[-1, 120]), runtimes=EVERYWHERE)
    assert kinds(network) == ["TRANSPOSE", "RESHAPE"]


def test_joined_axes_that_lie_together_but_in_another_order_are_transposed_first() -> None:
    """Stored as height, width, channels; joined as height, channels, width."""
    body = "t = Transpose <perm = [0, 2, 1, 3]> (x) y = Reshape (t, flat)"
    assert kinds(check(body, X | ints(flat=[-1, 120]))) == ["TRANSPOSE", "RESHAPE"]


def test_axes_of_size_one_come_and_go_by_a_reshape() -> None:
    body = "m = ReduceMean (x, axes) s = Squeeze (m, axes) e = Exp (s) u = Unsqueeze (e, axes) y = Mul (u, x)"
    network = check(body, X | ints(axes=[2, 3]))
    assert kinds(network) == ["MEAN", "EXP", "RESHAPE", "MUL"]


def test_a_reshape_that_mixes_the_batch_with_other_axes_is_refused_by_name() -> None:
    for target in ([-1, 3, 4, 5], [-1, 4, 5]):
        with pytest.raises(ConversionError, match=r"Reshape .* cannot be written to TFLite: it"):
            network_of("y = Reshape (x, target)", X | ints(target=target))


def test_sizes_that_do_not_fit_are_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot be reshaped to \(4,\)"):
        groups_of((2, 3), (4,), batch=False)


@st.composite
def factorings(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes with this product, ones among them."""
    sizes = []
    while size > 1 and len(sizes) < 2:
        sizes.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= sizes[-1]
    return [*sizes, size]


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Shape, list[tuple[str, list[int]]]]:
    """A shape, and transpositions and reshapes that leave the batch in front."""
    start = (1, *draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=3)))
    steps: list[tuple[str, list[int]]] = []
    rank = len(start)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            steps.append(("Transpose", [0, *draw(st.permutations(range(1, rank)))]))
        else:
            sizes = draw(factorings(math.prod(start)))
            steps.append(("Reshape", [-1, *sizes]))
            rank = len(sizes) + 1
    return start, steps


@settings(max_examples=80)
@given(journeys(), st.sampled_from(EVERYWHERE))
def test_any_row_of_reshapes_and_transpositions(
    journey: tuple[Shape, list[tuple[str, list[int]]]], runtime: str
) -> None:
    shape, steps = journey
    inputs = {"x": normal(*shape)}
    lines, value = [], "x"
    for index, (op, numbers) in enumerate(steps):
        if op == "Transpose":
            lines.append(f"v{index} = Transpose <perm = {numbers}> ({value})")
        else:
            inputs[f"s{index}"] = np.array(numbers, np.int64)
            lines.append(f"v{index} = Reshape ({value}, s{index})")
        lines.append(f"w{index} = Sin (v{index})")
        value = f"w{index}"
    network = check(f"{' '.join(lines)} y = Abs ({value})", inputs, runtimes=[runtime])
    assert kinds(network).count("TRANSPOSE") <= len(steps) + 1


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_concatenation_along_any_axis(axis: int) -> None:
    body = f"e = Exp (x) s = Sin (x) y = Concat <axis = {axis}> (e, x, s)"
    assert kinds(check(body, X)) == ["EXP", "SIN", "CONCATENATION"]


def test_concatenation_of_differently_stored_tensors_and_a_constant() -> None:
    body = "t = Transpose <perm = [0, 1, 3, 2]> (x) y = Concat <axis = 1> (t, x)"
    network = check(body, {"x": normal(1, 3, 4, 4)})
    assert kinds(network) == ["TRANSPOSE", "CONCATENATION"]


def test_concatenation_and_cuts_along_the_batch_are_refused_by_name() -> None:
    bodies = ["y = Concat <axis = 0> (x, x)", "y, z = Split <axis = 0, num_outputs = 2> (x)", "y = Gather (x, one)"]
    for body in [*bodies, "y = Slice (x, one, two, zero)", "y = Pad (x, pads)", "y = Tile (x, tiles)"]:
        with pytest.raises(ConversionError, match=r"cannot be written to TFLite: .* batch"):
            network_of(body, X | ints(one=[1], two=[2], zero=[0], pads=[1, 0, 0, 0, 0, 0, 0, 0], tiles=[2, 1, 1, 1]))


@pytest.mark.parametrize(
    ("axis", "sizes", "kind"), [(1, [3, 3], "SPLIT"), (3, [1, 4], "SPLIT_V"), (1, [2, 1, 3], "SPLIT_V")]
)
def test_splits(axis: int, sizes: list[int], kind: str) -> None:
    names = [f"p{i}" for i in range(len(sizes))]
    body = f"{', '.join(names)} = Split <axis = {axis}> (x, sizes) "
    body += f"y = Concat <axis = {axis}> ({', '.join(reversed(names))})"
    assert kinds(check(body, X | ints(sizes=sizes), runtimes=EVERYWHERE)) == [kind, "CONCATENATION"]


def test_a_split_with_a_part_that_nobody_reads() -> None:
    check("p, q = Split <axis = 1, num_outputs = 2> (x) y = Exp (q)", X)


def test_slices() -> None:
    cut = ints(starts=[1, -4], ends=[3, 2**31 - 1], axes=[1, 3])
    assert kinds(check("y = Slice (x, starts, ends, axes)", X | cut, runtimes=EVERYWHERE)) == ["SLICE"]
    whole = ints(starts=[0, 0], ends=[2**63 - 1, 6], axes=[0, 1])
    assert kinds(check("y = Slice (x, starts, ends, axes) ", X | whole)) == []


@settings(max_examples=60)
@given(st.data())
def test_any_slice_with_steps(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.integers(1, 6)) for _ in range(rank)]
    parts = []
    for size in sizes:
        kept = data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True).map(sorted))
        parts.append((kept[0] - data.draw(st.sampled_from([0, size])), kept[1], data.draw(st.integers(1, 3))))
    parts = [(start, end, step) for start, end, step in parts]
    cut = ints(
        starts=[p[0] for p in parts],
        ends=[p[1] for p in parts],
        axes=list(range(1, rank + 1)),
        steps=[p[2] for p in parts],
    )
    runtime = data.draw(st.sampled_from(EVERYWHERE))
    check("e = Exp (x) y = Slice (e, starts, ends, axes, steps)", {"x": normal(1, *sizes)} | cut, runtimes=[runtime])


def test_backward_slices_are_refused_by_name() -> None:
    with pytest.raises(ConversionError, match=r"Slice .* a negative step"):
        network_of("y = Slice (x, s, e, a, t)", X | ints(s=[-1], e=[-10], a=[2], t=[-1]))


@pytest.mark.parametrize("pads", [[0, 0, 1, 2, 0, 0, 3, 0], [0, 1, 0, 0, 0, 2, 1, 1]])
def test_padding(pads: list[int]) -> None:
    inputs = X | ints(pads=pads) | {"seven": np.float32(7), "zero": np.float32(0)}
    assert kinds(check("y = Pad (x, pads)", inputs, runtimes=EVERYWHERE)) == ["PAD"]
    assert kinds(check("y = Pad (x, pads, zero)", inputs)) == ["PAD"]
    assert kinds(check("y = Pad (x, pads, seven)", inputs, runtimes=EVERYWHERE)) == ["PADV2"]
    assert kinds(check('y = Pad <mode = "reflect"> (x, pads)', inputs, runtimes=EVERYWHERE)) == ["MIRROR_PAD"]


def test_padding_of_named_axes() -> None:
    check("y = Pad (x, pads, , axes)", X | ints(pads=[1, 2, 0, 3], axes=[-1, 1]))


def test_padding_with_copies_of_the_edge_and_cutting_are_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="padding mode 'edge'"):
        network_of('y = Pad <mode = "edge"> (x, pads)', X | ints(pads=[0, 0, 1, 0, 0, 0, 0, 0]))
    with pytest.raises(ConversionError, match="negative padding"):
        network_of("y = Pad (x, pads)", X | ints(pads=[0, 0, -1, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("indices", [1, -1, [2, 0], [[1, 3], [0, -1]]])
def test_gathering_with_constant_indices(axis: int, indices: object) -> None:
    body = f"e = Exp (x) y = Gather <axis = {axis}> (e, indices)"
    check(body, X | {"indices": np.array(indices, np.int64)}, runtimes=EVERYWHERE)


def test_tiles_and_expansions() -> None:
    assert kinds(check("y = Tile (x, tiles)", X | ints(tiles=[1, 2, 1, 3]), runtimes=EVERYWHERE)) == ["TILE"]
    body = "m = ReduceMean <keepdims = 1> (x, axes) y = Expand (m, sizes)"
    assert kinds(check(body, X | ints(axes=[2, 3], sizes=[1, 1, 4, 5]), runtimes=EVERYWHERE)) == ["MEAN", "TILE"]
    assert kinds(check("e = Exp (x) y = Expand (e, sizes)", X | ints(sizes=[5]))) == ["EXP"]


def test_casts() -> None:
    assert kinds(check("e = Exp (x) y = Cast <to = 1> (e)", X)) == ["EXP"]
    body = "i = Cast <to = 6> (x) l = Cast <to = 7> (i) b = Cast <to = 9> (l) y = Cast <to = 1> (b)"
    assert kinds(check(body, {"x": 3 * normal(1, 3, 4, 5)}, runtimes=EVERYWHERE)) == ["CAST"] * 4


def test_a_cast_to_a_type_that_is_not_written_is_refused_by_name() -> None:
    with pytest.raises(ConversionError, match=r"Cast .* known are float32"):
        network_of("d = Cast <to = 11> (x) y = Cast <to = 1> (d)", X)


def test_computed_arguments_are_refused_by_name() -> None:
    model = graph("s = Shape (x) y = Reshape (x, s)", X)
    with pytest.raises(ConversionError, match="operator Shape is not among those"):
        lower(model)
    for body in ("y = Slice (x, c, two)", "y = Pad (x, c)", "y = Gather <axis = 1> (x, c)", "y = Tile (x, c)"):
        inputs = X | ints(a=[1, 1, 1, 1], two=[2, 2, 2, 2])
        with pytest.raises(ConversionError):
            network_of(f"c = Neg (a) {body}", inputs)


def test_an_idle_gather_of_exporters_is_dropped() -> None:
    """ConvNeXt's pooling, as PyTorch exports a change of strides."""
    body = (
        "f = Reshape (x, minus) n = Shape <start = 0, end = 1> (x) b = Squeeze (n) r = Range (zero, b, step) "
        "m = Mul (r, size) u = Unsqueeze (m, axes) i = Add (u, inner) g = Gather (f, i) y = Exp (g)"
    )
    numbers = {"zero": np.int64(0), "step": np.int64(1), "size": np.int64(6)}
    inputs = {"x": normal(1, 6, 1, 1)} | numbers | ints(minus=[-1], axes=[1, 2, 3])
    inner = np.arange(6).reshape(1, 6, 1, 1)
    model = graph(body, inputs | {"inner": inner})
    model.graph.outputs[0].shape = model.graph.inputs[0].shape
    for node in model.graph:
        if node.op_type == "Gather":
            node.outputs[0].shape = model.graph.inputs[0].shape
    assert kinds(lower(model)) == ["EXP"]
    with pytest.raises(ConversionError, match=r"Gather|Shape"):
        network_of(body, inputs | {"inner": inner[:, ::-1].copy()})


def test_raw_images_are_normalized_in_the_order_in_which_they_come() -> None:
    """uint8 (N, H, W, C) in, as an exported network with its normalisation inside takes them."""
    text = """<ir_version: 9, opset_import: ["": 18]> g (uint8[batch,4,5,3] x) => (float[batch,3,4,5] y)
        <float[3,1,1] mean = {0.5, 0.4, 0.3}, float[3,1,1] deviation = {0.2, 0.25, 0.3}> {
        f = Cast <to = 1> (x) t = Transpose <perm = [0, 3, 1, 2]> (f) s = Sub (t, mean) y = Div (s, deviation) }"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    network = lower(model)
    assert kinds(network) == ["CAST", "SUB", "DIV"]
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    (expected,) = gradient_cases.run(model, {"x": images})
    for runtime in EVERYWHERE:
        (found,) = answers(runtime, to_bytes(network), images)
        assert_close(found, np.moveaxis(expected, 1, -1), where=runtime)
