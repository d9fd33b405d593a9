"""Gradients of Resize, DepthToSpace and SpaceToDepth, against PyTorch's and against onnxruntime's own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gradient_cases import check, gradients, graph_of, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
COORDINATES = ["asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"]
ROUNDINGS = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]


def resize_body(mode: str, coordinates: str, inputs: str, extra: str = "") -> str:
    return f'y = Resize <mode = "{mode}", coordinate_transformation_mode = "{coordinates}"{extra}> (x, , {inputs})'


def check_scales(mode: str, coordinates: str, x: np.ndarray, factors: list[float], extra: str = "") -> None:
    """The gradient is the transpose of onnxruntime's forward, which is measured one input cell at a time."""
    inputs = {"x": x, "s": np.array([1, 1, *factors], np.float32)}
    body = resize_body(mode, coordinates, "s", extra)
    (y,) = run(graph_of(body, inputs, fixed=["s"]), inputs)
    cotangent = normal(*y.shape, seed=1)
    found = gradients(graph_of(body, inputs, fixed=["s"]), inputs, ["x"], cotangent)["x"]
    cells = int(np.prod(x.shape[2:]))
    units = np.eye(cells, dtype=np.float32).reshape(cells, 1, *x.shape[2:])
    (columns,) = run(graph_of(body, {**inputs, "x": units}, fixed=["s"]), {**inputs, "x": units})
    expected = cotangent.reshape(-1, columns[0].size) @ columns.reshape(cells, -1).T
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=0, atol=2e-5)


@pytest.mark.parametrize("factors", [[2, 2], [3, 2], [0.5, 0.5], [1.5, 2.5], [1, 2], [0.6, 1.7], [1.1, 1]])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_gradient_of_nearest_resizing_is_the_transpose_of_the_forward(
    rounding: str, coordinates: str, factors: list[float]
) -> None:
    check_scales("nearest", coordinates, normal(2, 3, 4, 6), factors, f', nearest_mode = "{rounding}"')


@pytest.mark.parametrize("factors", [[2, 2], [3, 2], [0.5, 0.5], [1.5, 2.5], [1, 2], [0.6, 1.7], [0.25, 4]])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_the_gradient_of_interpolation_is_the_transpose_of_the_forward(
    mode: str, coordinates: str, factors: list[float]
) -> None:
    check_scales(mode, coordinates, normal(2, 3, 4, 6), factors)


def test_cubic_interpolation_that_leaves_out_the_border() -> None:
    check_scales("cubic", "half_pixel", normal(2, 3, 4, 5), [2, 1.5], ", exclude_outside = 1, cubic_coeff_a = -0.5")


@SETTINGS
@given(
    st.sampled_from(["nearest", "linear"]),
    st.sampled_from(COORDINATES),
    st.sampled_from(ROUNDINGS),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
)
def test_resizing_to_any_size_has_the_transpose_as_gradient(
    mode: str, coordinates: str, rounding: str, size: tuple[int, int], target: tuple[int, int]
) -> None:
    extra = f', nearest_mode = "{rounding}"' if mode == "nearest" else ""
    factors = [(out + 0.01) / n for n, out in zip(size, target, strict=True)]
    check_scales(mode, coordinates, normal(2, 2, *size), factors, extra)


@pytest.mark.parametrize(("size", "target"), [((4, 6), (8, 12)), ((4, 6), (7, 9)), ((8, 9), (4, 3)), ((3, 5), (1, 1))])
@pytest.mark.parametrize(
    ("mode", "coordinates", "kind", "corners"),
    [
        ("nearest", "asymmetric", "nearest", None),
        ("linear", "half_pixel", "bilinear", False),
        ("linear", "align_corners", "bilinear", True),
        ("cubic", "align_corners", "bicubic", True),
    ],
)
def test_resizing_to_a_size_has_pytorchs_gradient(
    mode: str, coordinates: str, kind: str, corners: bool | None, size: tuple[int, int], target: tuple[int, int]
) -> None:
    inputs = {"x": normal(2, 3, *size), "s": np.array([2, 3, *target])}
    body = resize_body(mode, coordinates, ", s", ', nearest_mode = "floor"')

    def reference(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, target, mode=kind, align_corners=corners)

    check(body, inputs, reference, fixed=["s"], batch=False)


def test_resizing_named_axes_of_a_free_batch() -> None:
    inputs = {"x": normal(2, 3, 4, 6), "s": np.array([7, 9])}
    body = resize_body("linear", "half_pixel", ", s", ", axes = [2, 3]")
    check(body, inputs, lambda x, s: F.interpolate(x, (7, 9), mode="bilinear"), fixed=["s"])


@pytest.mark.parametrize(("shape", "factors"), [((2, 3, 5), [2]), ((2, 2, 3, 2, 4), [2, 1, 3])])
def test_resizing_signals_and_volumes(shape: tuple[int, ...], factors: list[int]) -> None:
    inputs = {"x": normal(*shape), "s": np.array([1, 1, *factors], np.float32)}
    body = resize_body("nearest", "asymmetric", "s", ', nearest_mode = "floor"')
    target = [n * f for n, f in zip(shape[2:], factors, strict=True)]
    check(body, inputs, lambda x, s: F.interpolate(x, target, mode="nearest"), wrt=["x"], fixed=["s"])


@pytest.mark.parametrize(("factor", "operator"), [(2, "AveragePool"), (1.5, "MatMul")])
def test_whole_factors_are_summed_by_pooling(factor: float, operator: str) -> None:
    x = normal(2, 3, 4, 4)
    inputs = {"x": x, "s": np.array([1, 1, factor, factor], np.float32)}
    model = graph_of(resize_body("nearest", "half_pixel", "s"), inputs, fixed=["s"])
    gradients(model, inputs, ["x"], normal(2, 3, int(4 * factor), int(4 * factor)))
    assert {node.op_type for node in nodes_of(model.graph, "AveragePool", "MatMul")} == {operator}


@pytest.mark.parametrize(
    ("extra", "coordinates", "why"),
    [(", antialias = 1", "half_pixel", "antialiasing"), ("", "tf_crop_and_resize", "tf_crop_and_resize")],
)
def test_forms_of_resizing_without_a_rule_are_refused(extra: str, coordinates: str, why: str) -> None:
    inputs = {"x": normal(2, 3, 4, 4), "s": np.array([1, 1, 2, 2], np.float32)}
    model = graph_of(resize_body("linear", coordinates, "s", extra), inputs, fixed=["s"])
    with pytest.raises(ConversionError, match=f"Resize.*{why}"):
        gradients(model, inputs, ["x"], normal(2, 3, 8, 8))


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_the_gradient_of_depth_to_space_is_pytorchs(mode: str, block: int) -> None:
    x = normal(2, 2 * block**2, 3, 5)
    order = [i * 2 + c for c in range(2) for i in range(block**2)] if mode == "DCR" else range(2 * block**2)
    body = f'y = DepthToSpace <blocksize = {block}, mode = "{mode}"> (x)'
    check(body, {"x": x}, lambda x: F.pixel_shuffle(x[:, list(order)], block))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_gradient_of_space_to_depth_is_pytorchs(block: int) -> None:
    order = [c * block**2 + i for i in range(block**2) for c in range(2)]
    body = f"y = SpaceToDepth <blocksize = {block}> (x)"
    check(body, {"x": normal(2, 2, 3 * block, 2 * block)}, lambda x: F.pixel_unshuffle(x, block)[:, order])
