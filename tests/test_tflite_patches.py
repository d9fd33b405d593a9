"""Patch tables of .tflite files: writing new numbers where they point gives the file that a fresh export gives."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tflite
import torch
from shared_export import export_graph
from torch import nn

from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.graph_tools import set_array
from lorac_exporters.tflite.export import Prepared, prepare
from lorac_exporters.tflite.network import Network, Operator, Quantization, Source, Tensor
from lorac_exporters.tflite.patches import patch_entries, unpatchable, with_partners
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.tflite_config import WEIGHTS, TfliteConfig
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import InputSpec, Patch
from lorac_runtime.quantization import bias_scales, quantized_bias, quantized_weight, weight_scales

SPEC = InputSpec("input", (3, 12, 12), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
TRANSPOSED = "7."
NAMES = ("a", "b", "c")
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), dtype=np.uint8)


@functools.cache
def canonical() -> Canonical:
    """Every kind of layer that has a weight: dense, grouped, depthwise, transposed, and a head behind a Flatten."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, (1, 3), dilation=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.ConvTranspose2d(16, 6, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 6 * 2, 3),
    )
    return canonicalize(export_graph(net.eval(), SPEC.shape))


def numbers() -> dict[str, np.ndarray]:
    """Every weight and bias; the limits of a ReLU6 are not among them."""
    return {name: value for name, value in canonical().values.items() if value.ndim}


def shapes(weights: str) -> dict[str, tuple[int, ...]]:
    """Of all that can be patched: in int8 the bias of a transposed convolution is added by an operator of its own."""
    left_out = (TRANSPOSED,) if weights == "int8" else ()
    return {name: value.shape for name, value in numbers().items() if not name.startswith(left_out)}


def prepared(model: ir.Model, weights: str, calibration: object = IMAGES) -> Prepared:
    calibration = calibration if weights == "int8" else None
    return prepare(
        model,
        TfliteConfig(weights),  # type: ignore[arg-type]
        spec=SPEC,
        class_names=NAMES,
        name="net",
        calibration=calibration,  # type: ignore[arg-type]
    )


def stored(patch: Patch, value: np.ndarray) -> np.ndarray:
    """The order of numbers that a patch entry asks for."""
    value = value.reshape(patch.view or patch.shape)
    return value if patch.permute is None else value.transpose(patch.permute)


def patched(content: bytes, patches: tuple[Patch, ...], values: dict[str, np.ndarray]) -> bytes:
    """What fusing on a device does, written once more and in the plainest way."""
    result, by_name = bytearray(content), {p.tensor: p for p in patches}
    for patch in patches:
        value = values[patch.tensor]
        if patch.quantization is not None:
            q = patch.quantization
            weight_name, bias_name = (patch.tensor, q.partner) if patch.dtype == "int8" else (q.partner, patch.tensor)
            weight = by_name[weight_name]
            per_tensor = weight.quantization.scales.nbytes == 4
            axis = None if per_tensor else weight.quantization.axis
            scales = weight_scales(values[weight_name], axis, values.get(bias_name), q.input_scale)
            if patch.dtype == "int8":
                value = quantized_weight(value, scales, axis)
            else:
                scales = bias_scales(scales, q.input_scale)
                value, saturated = quantized_bias(value, scales)
                assert saturated == 0
            result[q.scales.offset : q.scales.end] = scales.tobytes()
        data = np.ascontiguousarray(stored(patch, value)).astype(patch.dtype).tobytes()
        assert len(data) == patch.nbytes
        result[patch.offset : patch.offset + patch.nbytes] = data
    return bytes(result)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_new_numbers_by_the_patch_table_give_the_file_that_a_fresh_export_gives(weights: str) -> None:
    base, rng = canonical(), np.random.default_rng(1)
    before = prepared(base.model, weights)
    content = to_bytes(before.network)
    patches = patch_entries(before.network, content, "base.tflite", shapes(weights))
    assert [p.tensor for p in patches] == list(shapes(weights))
    values = {n: (numbers()[n] + rng.normal(0, 0.5, shape)).astype(np.float32) for n, shape in shapes(weights).items()}
    twin = base.model.clone()
    for name, value in values.items():
        set_array(twin.graph.initializers[name], value)
    after = prepared(twin, weights, before.ranges)
    assert after.ranges == before.ranges
    assert to_bytes(after.network) != content
    assert patched(content, patches, values) == to_bytes(after.network)
    assert patched(content, patches, base.values) == content


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_numbers_at_each_place_are_the_models(weights: str) -> None:
    base = canonical()
    network = prepared(base.model, weights).network
    content = to_bytes(network)
    for patch in patch_entries(network, content, "f.tflite", shapes(weights)):
        raw = np.frombuffer(content[patch.offset : patch.offset + patch.nbytes], patch.dtype).astype(np.float64)
        tolerance = 1e-3
        if patch.quantization is not None:
            q = patch.quantization
            scales = np.frombuffer(content[q.scales.offset : q.scales.end], np.float32)
            own = np.ones(len(patch.shape), int)
            own[q.axis] = len(scales)
            factor = stored(patch, np.broadcast_to(scales.reshape(own), patch.shape))
            raw, tolerance = raw * factor.reshape(-1), 0.51 * float(scales.max())
        expected = stored(patch, base.values[patch.tensor]).reshape(-1)
        np.testing.assert_allclose(raw, expected, atol=tolerance, rtol=1e-3)


def test_a_transposed_convolution_in_int8_is_refused() -> None:
    base = canonical()
    network = prepared(base.model, "int8").network
    text = refused(network, {name: value.shape for name, value in numbers().items()})
    for name in ("7.weight", "7.bias"):
        assert name in text
    assert text.count("\n") == 2


def test_an_int8_layer_brings_its_bias_along_and_a_float_one_does_not() -> None:
    base = canonical()
    wanted = {"0.weight": base.values["0.weight"].shape, "10.bias": (3,)}
    assert with_partners(prepared(base.model, "float32").network, wanted) == wanted
    assert with_partners(prepared(base.model, "fp16").network, wanted) == wanted
    found = with_partners(prepared(base.model, "int8").network, wanted)
    assert set(found) == {"0.weight", "0.bias", "10.weight", "10.bias"}
    assert all(shape == base.values[name].shape for name, shape in found.items())


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def linear(*weights: Tensor) -> Network:
    """Linear layers without bias, one after the other, 4 -> 4."""
    x = first = Tensor("x", (1, 4), batch_axis=0)
    operators = []
    for i, weight in enumerate(weights):
        y = Tensor(f"y{i}", (1, weight.shape[0]), batch_axis=0)
        operators.append(Operator("FULLY_CONNECTED", [x, weight, None], [y]))
        x = y
    return Network(operators, [first], [x], ("x",), ("y",))


def refused(network: Network, wanted: dict[str, tuple[int, ...]], content: bytes = b"") -> str:
    with pytest.raises(ConversionError) as error:
        patch_entries(network, content or to_bytes(network), "base.tflite", wanted)
    return str(error.value)


def square(name: str, source: Source | None) -> Tensor:
    return Tensor(name, (4, 4), data=np.ones((4, 4), np.float32), source=source)


def test_tensors_whose_numbers_are_not_the_models_are_all_named() -> None:
    network = linear(square("scaled", None), square("own", Source("own", (4, 4))))
    text = refused(network, {"scaled": (4, 4), "own": (4, 4), "gone": (2,)})
    assert "base.tflite holds tensors that cannot be adapted in place:" in text
    for name in ("scaled", "gone"):
        assert f"{name} is stored with other numbers than the model has, or not at all" in text
    assert "own" not in text
    assert unpatchable(network, ["scaled", "own"]) == ("scaled",)


def test_a_tensor_that_is_stored_twice_is_refused() -> None:
    network = linear(square("a", Source("w", (4, 4))), square("b", Source("w", (4, 4), permute=(1, 0))))
    assert "w is stored 2 times (a, b)" in refused(network, {"w": (4, 4)})


def test_a_tensor_of_another_shape_is_refused() -> None:
    assert "w has shape (4, 4), expected (2, 8)" in refused(linear(square("w", Source("w", (4, 4)))), {"w": (2, 8)})


def test_tensors_that_share_their_bytes_are_refused() -> None:
    network = linear(square("v", Source("v", (4, 4))), square("w", Source("w", (4, 4))))
    content = bytearray(to_bytes(network))
    graph = tflite.Model.GetRootAs(content).Subgraphs(0)
    tensors = {graph.Tensors(i).Name().decode(): graph.Tensors(i) for i in range(graph.TensorsLength())}
    table = tensors["w"]._tab
    field = table.Pos + table.Offset(8)  # where the number of the buffer stands
    content[field : field + 4] = tensors["v"].Buffer().to_bytes(4, "little")
    text = refused(network, {"v": (4, 4), "w": (4, 4)}, bytes(content))
    assert "v shares its bytes with w" in text
    assert "w shares its bytes with v" in text


def test_an_int8_operand_that_is_no_weight_is_refused() -> None:
    one = Quantization(np.ones(1, np.float32), np.zeros(1, np.int64))
    factor = Tensor("factor", (1, 4), "int8", np.ones((1, 4), np.int8), one, source=Source("factor", (4, 1)))
    x, y = (Tensor(n, (1, 4), "int8", quantization=one, batch_axis=0) for n in "xy")
    network = Network([Operator("MUL", [x, factor], [y])], [x], [y], ("x",), ("y",))
    text = refused(network, {"factor": (4, 1)})
    assert "factor is stored as int8, but is not weight or bias of a layer; its scale would not follow" in text


def test_the_file_itself_is_asked_where_the_numbers_lie(tmp_path: Path) -> None:
    network = linear(square("w", Source("w", (4, 4))))
    (patch,) = patch_entries(network, to_bytes(network), "base.tflite", {"w": (4, 4)})
    assert (patch.dtype, patch.nbytes, patch.offset % 16) == ("float32", 64, 0)
    assert (patch.permute, patch.view, patch.quantization) == (None, None, None)
