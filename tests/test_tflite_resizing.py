"""Resize, DepthToSpace and SpaceToDepth: TFLite's own operators where they do what ONNX says, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tflite_cases import EVERYWHERE, Arrays, check, check_sources, graph, kinds, network_of, node, normal, only

from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.patches import patch_entries
from lorac_exporters.tflite.quantize import quantize
from lorac_exporters.tflite.resize_grids import WAYS, Grid, onnx_linear, tflite_linear, tflite_nearest
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ConversionError

SETTINGS = settings(max_examples=80)
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


def scaled(*factors: float, **attributes: object) -> tuple[str, Arrays]:
    body = node("Resize", "x, , s", **attributes)
    return body, {"s": np.array([1, 1, *factors], np.float32)}


@pytest.mark.parametrize(
    ("attributes", "factor", "kind", "options"),
    [
        # what PyTorch's exporters write for nearest, nearest-exact, bilinear and bilinear with align_corners
        (
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            2,
            "RESIZE_NEAREST_NEIGHBOR",
            (False, True),
        ),
        ({"mode": "nearest"}, 3, "RESIZE_NEAREST_NEIGHBOR", (False, True)),
        ({"mode": "linear"}, 2, "RESIZE_BILINEAR", (False, True)),
        (
            {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
            2,
            "RESIZE_BILINEAR",
            (False, True),
        ),
        ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, 2, "RESIZE_BILINEAR", (False, False)),
        ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 3, "RESIZE_BILINEAR", (True, False)),
    ],
)
def test_the_ways_that_networks_use_are_one_operator(
    attributes: dict[str, object], factor: int, kind: str, options: tuple[bool, bool]
) -> None:
    body, inputs = scaled(factor, factor, **attributes)
    network = check(body, {"x": normal(1, 3, 5, 4)} | inputs, runtimes=EVERYWHERE)
    found = only(network, kind).options
    assert kinds(network) == [kind]
    assert (found["align_corners"], found["half_pixel_centers"]) == options


def test_a_large_image_is_resized_in_pytorchs_way() -> None:
    body, inputs = scaled(2, 2, mode="linear")
    check(body, {"x": normal(1, 1, 112, 90)} | inputs)


@SETTINGS
@given(st.data(), st.sampled_from(["nearest", "linear"]), st.sampled_from(WAYS), st.sampled_from(ROUNDINGS))
def test_any_resize_is_onnxs_or_refused(data: st.DataObject, mode: str, way: str, rounding: str) -> None:
    rank = data.draw(st.integers(1, 2))
    x = normal(1, 2, *(data.draw(st.integers(1, 7)) for _ in range(rank)))
    attributes = {"mode": mode, "coordinate_transformation_mode": way, "nearest_mode": rounding}
    if data.draw(st.booleans()):
        factors = [data.draw(st.sampled_from([1, 2, 3, 4, 0.5, 1.5, 2.5, 0.3])) for _ in range(rank)]
        assume(all(int(n * f) for n, f in zip(x.shape[2:], factors, strict=True)))
        body, inputs = scaled(*factors, **attributes)
    else:
        sizes = [data.draw(st.integers(1, 12)) for _ in range(rank)]
        body = node("Resize", "x, , , s", axes=list(range(2, 2 + rank)), **attributes)
        inputs = {"s": np.array(sizes)}
    try:
        lower(graph(body, {"x": x} | inputs))
    except ConversionError:
        assert mode == "linear"
        return
    check(body, {"x": x} | inputs)


def test_nearest_pixels_in_a_way_that_tflite_lacks_are_gathered() -> None:
    body, inputs = scaled(1.5, 2, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil")
    assert kinds(check(body, {"x": normal(1, 3, 4, 5)} | inputs, runtimes=EVERYWHERE)) == ["GATHER", "GATHER"]


@pytest.mark.parametrize("way", [False, True])
def test_tflites_grids_are_pytorchs(way: bool) -> None:
    image = torch.eye(5)[None]  # linear resizing of unit vectors gives the weights
    found = tflite_linear(Grid(5, 8, 1.6, "any"), way, not way)
    expected = torch.nn.functional.interpolate(image, size=8, mode="linear", align_corners=way)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-6)
    exact = torch.nn.functional.interpolate(torch.arange(5.0)[None, None], size=8, mode="nearest-exact")
    assert tflite_nearest(Grid(5, 8, 1.6, "any"), False, True).tolist() == exact[0, 0].tolist()


def test_the_weights_of_a_resized_pixel_add_up_to_one() -> None:
    for way in WAYS:
        np.testing.assert_allclose(onnx_linear(Grid(7, 12, 12 / 7, way)).sum(1), 1)


@pytest.mark.parametrize(
    ("attributes", "factors", "why"),
    [
        ({"mode": "cubic"}, (2, 2), "mode 'cubic'"),
        ({"mode": "linear"}, (1.3, 1.3), "another way"),
        ({"mode": "linear", "antialias": 1}, (0.5, 0.5), "antialias"),
        ({"coordinate_transformation_mode": "tf_crop_and_resize"}, (2, 2), "tf_crop_and_resize"),
    ],
)
def test_other_resizing_is_refused_by_name(
    attributes: dict[str, object], factors: tuple[float, float], why: str
) -> None:
    body, inputs = scaled(*factors, **attributes)
    with pytest.raises(ConversionError, match=f"Resize .*{why}"):
        lower(graph(body, {"x": normal(1, 3, 5, 6)} | inputs))


def test_resized_channels_are_refused() -> None:
    inputs = {"x": normal(1, 3, 5, 6), "s": np.array([1, 2, 1, 1], np.float32)}
    with pytest.raises(ConversionError, match="only height and width"):
        lower(graph(node("Resize", "x, , s"), inputs))


def test_a_resize_to_the_same_size_is_nothing() -> None:
    body, inputs = scaled(1, 1, mode="cubic")
    network = check(f"{body.replace('y =', 'v =')} y = Relu (v)", {"x": normal(1, 3, 5, 6)} | inputs)
    assert kinds(network) == ["RELU"]


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("block", [2, 3])
def test_channels_become_pixels_as_in_onnx(mode: str, block: int) -> None:
    inputs = {"x": normal(1, 2 * block**2, 3, 4)}
    network = check(node("DepthToSpace", "x", blocksize=block, mode=mode), inputs, runtimes=EVERYWHERE)
    assert kinds(network) == (["DEPTH_TO_SPACE"] if mode == "DCR" else ["GATHER", "DEPTH_TO_SPACE"])


@pytest.mark.parametrize("block", [2, 3])
def test_pixels_become_channels_as_in_onnx(block: int) -> None:
    inputs = {"x": normal(1, 2, 2 * block, 3 * block)}
    network = check(node("SpaceToDepth", "x", blocksize=block), inputs, runtimes=EVERYWHERE)
    assert kinds(network) == ["SPACE_TO_DEPTH"]


CONV = {"x": normal(1, 3, 4, 5), "w": normal(12, 3, 3, 3, seed=1), "b": normal(12, seed=2)}
SHUFFLE = "c = Conv (x, w, b) " + node("DepthToSpace", "c", blocksize=2, mode="CRD")


def test_a_pixel_shuffle_behind_a_convolution_costs_nothing_more() -> None:
    assert kinds(check(SHUFFLE, CONV, runtimes=EVERYWHERE)) == ["CONV_2D", "DEPTH_TO_SPACE"]


def test_new_weights_can_be_written_behind_a_pixel_shuffle() -> None:
    found = check_sources(graph(SHUFFLE, CONV))
    assert {name: t.source.view for name, t in found.items() if t.source} == {"w": (3, 4, 3, 3, 3), "b": (3, 4)}


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (SHUFFLE, CONV),
        ("y = ConvTranspose <strides = [2, 2]> (x, w)", {"x": CONV["x"], "w": normal(3, 4, 2, 2, seed=1)}),
    ],
)
def test_int8_weights_whose_scales_lie_in_another_order_are_not_patched(body: str, inputs: Arrays) -> None:
    network = network_of(body, inputs)
    wanted = {"w": inputs["w"].shape}
    assert patch_entries(network, to_bytes(network), "base.tflite", wanted)
    quantize(network, {tensor.name: (-4.0, 4.0) for tensor in network.tensors()})
    with pytest.raises(ConversionError, match="w is stored as int8"):
        patch_entries(network, to_bytes(network), "base.tflite", wanted)


TWICE = f"""
    {SHUFFLE.replace("y =", "d =")} m = GlobalMaxPool (c) n = Reshape (m, s)
    e = GlobalMaxPool (d) y = Concat <axis = 1> (e, n)
"""


@pytest.mark.parametrize("body", [TWICE, SHUFFLE.replace("Conv (x", "Conv <group = 3> (x")])
def test_a_convolution_with_other_readers_or_groups_keeps_its_channels(body: str) -> None:
    inputs = CONV | {"s": np.array([-1, 12, 1, 1])}
    if "group" in body:
        inputs["w"] = normal(12, 1, 3, 3, seed=1)
    assert "GATHER" in kinds(check(body, inputs))
