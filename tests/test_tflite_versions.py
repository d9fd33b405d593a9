"""Versions of operators: the published rules, and what the two runtimes know of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tflite_runtimes import RuntimeRefusedError, answers
from tflite_samples import convolution, int8_convolution, network_of, one_scale

from lorac_exporters.tflite.network import DType, Operator, Quantization, Tensor
from lorac_exporters.tflite.releases import RELEASES
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.tflite.schema_options import KINDS
from lorac_exporters.tflite.versions import lowest, min_runtime_version, settle


def tensor(dtype: DType, shape: tuple[int, ...] = (1, 4, 4, 8), scales: int = 0) -> Tensor:
    """A tensor; with ``scales``, quantized with so many."""
    numbers = np.full(max(scales, 1), 0.5, np.float32)
    quantization = Quantization(numbers, np.zeros(numbers.shape, np.int64), 0) if scales else None
    return Tensor("t", shape, dtype, quantization=quantization)


FLOAT, INT8 = tensor("float32"), tensor("int8", scales=1)
FILTER, INT8_FILTER = tensor("float32", (8, 3, 3, 8)), tensor("int8", (8, 3, 3, 8), scales=8)
WIDE = tensor("float32", (1, 2, 3, 4, 5))
AXES = tensor("int32", (2,))

# kind, inputs, output, options -> version, as TensorFlow's op_version.cc has it.
CASES: list[tuple[str, list[Tensor | None], Tensor, dict[str, Any], int]] = [
    ("CONV_2D", [FLOAT, FILTER, None], FLOAT, {}, 1),
    ("CONV_2D", [FLOAT, FILTER, None], FLOAT, {"dilation_w_factor": 2}, 1),
    ("CONV_2D", [INT8, INT8_FILTER, None], INT8, {}, 3),
    ("CONV_2D", [FLOAT, tensor("float32", (8, 3, 3, 4)), None], FLOAT, {}, 6),
    ("CONV_2D", [INT8, tensor("int8", (8, 3, 3, 4), scales=8), None], INT8, {}, 6),
    ("CONV_2D", [FLOAT, tensor("int8", (8, 3, 3, 8), scales=1), None], FLOAT, {}, 2),
    ("CONV_2D", [FLOAT, INT8_FILTER, None], FLOAT, {}, 5),
    ("DEPTHWISE_CONV_2D", [FLOAT, FILTER, None], FLOAT, {"dilation_w_factor": 1}, 1),
    ("DEPTHWISE_CONV_2D", [FLOAT, FILTER, None], FLOAT, {"dilation_w_factor": 2}, 2),
    ("DEPTHWISE_CONV_2D", [FLOAT, FILTER, None], FLOAT, {"dilation_h_factor": 2}, 2),
    ("DEPTHWISE_CONV_2D", [INT8, INT8_FILTER, None], INT8, {"dilation_h_factor": 2}, 3),
    ("DEPTHWISE_CONV_2D", [FLOAT, INT8_FILTER, None], FLOAT, {}, 6),
    ("TRANSPOSE_CONV", [AXES, FILTER, FLOAT], FLOAT, {}, 1),
    ("TRANSPOSE_CONV", [AXES, INT8_FILTER, INT8], INT8, {}, 2),
    ("TRANSPOSE_CONV", [AXES, FILTER, FLOAT, FLOAT], FLOAT, {}, 3),
    ("TRANSPOSE_CONV", [AXES, FILTER, FLOAT, FLOAT], FLOAT, {"fused_activation_function": "RELU"}, 4),
    ("FULLY_CONNECTED", [FLOAT, FILTER, FLOAT], FLOAT, {}, 1),
    ("FULLY_CONNECTED", [FLOAT, FILTER, None], FLOAT, {}, 1),
    ("FULLY_CONNECTED", [FLOAT, FILTER], FLOAT, {}, 6),
    ("FULLY_CONNECTED", [FLOAT, FILTER, None], FLOAT, {"keep_num_dims": True}, 5),
    ("FULLY_CONNECTED", [INT8, INT8_FILTER, None], INT8, {}, 4),
    ("FULLY_CONNECTED", [INT8, INT8_FILTER, None], INT8, {"keep_num_dims": True}, 5),
    ("FULLY_CONNECTED", [FLOAT, INT8_FILTER, None], FLOAT, {}, 12),
    ("FULLY_CONNECTED", [FLOAT, INT8, None], FLOAT, {}, 3),
    ("BATCH_MATMUL", [FLOAT, FLOAT], FLOAT, {}, 1),
    ("BATCH_MATMUL", [INT8, INT8], INT8, {}, 2),
    ("ADD", [FLOAT, FLOAT], FLOAT, {}, 1),
    ("ADD", [INT8, INT8], INT8, {}, 2),
    ("ADD", [tensor("int64"), tensor("int64")], tensor("int64"), {}, 4),
    ("SUB", [WIDE, FLOAT], WIDE, {}, 3),
    ("SUB", [WIDE, WIDE], WIDE, {}, 1),
    ("DIV", [WIDE, FLOAT], WIDE, {}, 2),
    ("MAXIMUM", [FLOAT, WIDE], WIDE, {}, 3),
    ("MINIMUM", [INT8, INT8], INT8, {}, 2),
    ("MUL", [FLOAT, FLOAT], FLOAT, {}, 1),
    ("MUL", [INT8, INT8], INT8, {}, 2),
    ("MUL", [INT8, INT8], Tensor("t", (1, 4, 4, 8), "int8", quantization=one_scale(0.25, 0)), {}, 3),
    ("MUL", [INT8, INT8], Tensor("t", (1, 4, 4, 8), "int8", quantization=one_scale(0.26, 0)), {}, 2),
    ("PAD", [FLOAT, AXES], FLOAT, {}, 1),
    ("PAD", [INT8, AXES], INT8, {}, 2),
    ("PADV2", [WIDE, AXES, FLOAT], WIDE, {}, 4),
    ("TRANSPOSE", [FLOAT, AXES], FLOAT, {}, 1),
    ("TRANSPOSE", [INT8, AXES], INT8, {}, 2),
    ("TRANSPOSE", [WIDE, AXES], WIDE, {}, 4),
    ("TRANSPOSE", [tensor("float32", (1,) * 6), AXES], FLOAT, {}, 6),
    ("SLICE", [INT8, AXES, AXES], INT8, {}, 2),
    ("SLICE", [WIDE, AXES, AXES], WIDE, {}, 5),
    ("STRIDED_SLICE", [FLOAT, AXES, AXES, AXES], FLOAT, {"begin_mask": 1}, 1),
    ("STRIDED_SLICE", [FLOAT, AXES, AXES, AXES], FLOAT, {"ellipsis_mask": 1}, 6),
    ("STRIDED_SLICE", [WIDE, AXES, AXES, AXES], WIDE, {}, 4),
    ("SPLIT", [AXES, FLOAT], FLOAT, {}, 1),
    ("SPLIT", [AXES, INT8], INT8, {}, 2),
    ("SPLIT_V", [INT8, AXES, AXES], INT8, {}, 2),
    ("RESIZE_BILINEAR", [FLOAT, AXES], FLOAT, {"align_corners": True}, 1),
    ("RESIZE_BILINEAR", [FLOAT, AXES], FLOAT, {"half_pixel_centers": True}, 3),
    ("RESIZE_NEAREST_NEIGHBOR", [FLOAT, AXES], FLOAT, {"align_corners": True}, 3),
    ("RESIZE_NEAREST_NEIGHBOR", [INT8, AXES], INT8, {}, 2),
    ("CAST", [tensor("uint8")], FLOAT, {}, 1),
    ("CAST", [FLOAT], tensor("float16"), {}, 5),
    ("CAST", [FLOAT], INT8, {}, 3),
    ("DEQUANTIZE", [tensor("uint8", scales=1)], FLOAT, {}, 1),
    ("DEQUANTIZE", [INT8], FLOAT, {}, 2),
    ("DEQUANTIZE", [tensor("float16")], FLOAT, {}, 3),
    ("DEQUANTIZE", [INT8_FILTER], FLOAT, {}, 5),
    ("QUANTIZE", [FLOAT], INT8, {}, 1),
    ("QUANTIZE", [tensor("uint8", scales=1)], INT8, {}, 1),
    ("QUANTIZE", [FLOAT], INT8_FILTER, {}, 3),
    ("BROADCAST_TO", [FLOAT, AXES], FLOAT, {}, 2),
    ("BROADCAST_TO", [INT8, AXES], INT8, {}, 3),
    ("TILE", [INT8, AXES], INT8, {}, 3),
    ("GATHER", [FLOAT, AXES], FLOAT, {"batch_dims": 1}, 5),
    ("RELU", [tensor("uint8", scales=1)], tensor("uint8", scales=1), {}, 2),
    ("L2_NORMALIZATION", [FLOAT], INT8, {}, 2),
    ("SOFTMAX", [INT8], INT8, {}, 2),
    ("MEAN", [INT8, AXES], INT8, {}, 2),
    ("HARD_SWISH", [INT8], INT8, {}, 1),
    ("LEAKY_RELU", [INT8], INT8, {}, 1),
    ("RESHAPE", [INT8, AXES], INT8, {}, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4]}")
def test_versions_follow_the_published_rules(case: tuple[Any, ...]) -> None:
    kind, inputs, output, options, version = case
    assert lowest(Operator(kind, inputs, [output], options)) == version


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"BROADCAST_TO", "FLOOR_DIV", "WHERE"}))
def test_float32_of_rank_4_needs_version_1(kind: str) -> None:
    assert lowest(Operator(kind, [FLOAT, FLOAT, FLOAT], [FLOAT])) == 1


def test_settling_fills_in_only_what_is_open() -> None:
    network = int8_convolution()
    settle(network)
    assert [op.version for op in network.operators] == [3]
    network.operators[0].version = 7
    settle(network)
    assert [op.version for op in network.operators] == [7]


def test_writing_an_unsettled_network_settles_its_file() -> None:
    network = int8_convolution()
    content = to_bytes(network)
    assert network.operators[0].version == 0
    settle(network)
    assert to_bytes(network) == content


def test_the_first_release_that_runs_a_network_is_that_of_its_latest_operator() -> None:
    assert min_runtime_version(convolution()) == "1.5.0"
    assert min_runtime_version(int8_convolution()) == "1.14.0"
    x, y, z = (Tensor(n, (1, 2)) for n in "xyz")
    network = network_of(Operator("GELU", [x], [y]), Operator("MUL", [y, y], [z]))
    assert min_runtime_version(network) == "2.9.0"  # not "1.5.0", though it is last, nor the largest text


@pytest.mark.parametrize(
    ("runtime", "release"), [("tflite-runtime without XNNPACK", "2.14.0"), ("ai-edge-litert without XNNPACK", "2.99")]
)
def test_runtimes_know_the_versions_of_their_release_and_no_later(runtime: str, release: str) -> None:
    wrong = []
    for kind, words in RELEASES.items():
        for version, first in enumerate(words.split(), start=1):
            expected = first != "-" and numbers(first) <= numbers(release)
            if knows(runtime, kind, version) != expected:
                wrong.append(f"{kind} {version}, of {first}")
    assert wrong == []


def numbers(release: str) -> list[int]:
    """A release as numbers that compare."""
    return [int(part) for part in release.split(".")]


def knows(runtime: str, kind: str, version: int) -> bool:
    """Whether a runtime has a kernel for a version of an operator; the operator itself is nonsense."""
    x, y = Tensor("x", (1, 2, 2, 1)), Tensor("y", (1, 2, 2, 1))
    content = to_bytes(network_of(Operator(kind, [x], [y], version=version)))
    try:
        answers(runtime, content, np.zeros(x.shape, np.float32))
    except RuntimeRefusedError as err:
        return "find op for builtin" not in str(err)
    return True


def test_every_operator_that_can_be_written_has_a_release() -> None:
    assert set(RELEASES) == set(KINDS)


def hybrid(version: int) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """A FULLY_CONNECTED with int8 weights and a scale for each channel: file, inputs, outputs, largest rounding."""
    rng = np.random.default_rng(0)
    x, y = Tensor("x", (1, 16), batch_axis=0), Tensor("y", (1, 4), batch_axis=0)
    weight = rng.integers(-127, 128, (4, 16)).astype(np.int8)
    scales = np.array([0.001, 0.01, 0.1, 1], np.float32)
    constant = Tensor("w", (4, 16), "int8", data=weight, quantization=Quantization(scales, np.zeros(4, np.int64), 0))
    operator = Operator("FULLY_CONNECTED", [x, constant, None], [y], version=version)
    images, real = rng.normal(size=(3, 16)).astype(np.float32), weight * scales[:, None]
    step = np.abs(images).max(axis=1, keepdims=True) / 127  # the runtime rounds its inputs to int8, too
    return to_bytes(network_of(operator)), images, images @ real.T, step / 2 * np.abs(real).sum(axis=1)


def test_int8_weights_with_scales_for_each_channel_are_refused_by_the_old_runtime() -> None:
    content, images, expected, rounding = hybrid(version=0)
    with pytest.raises(RuntimeRefusedError, match="'FULLY_CONNECTED' version '12'"):
        answers("tflite-runtime", content, images)
    (found,) = answers("ai-edge-litert", content, images)
    assert (np.abs(found - expected) <= 1.01 * rounding).all()


def test_with_a_lower_version_the_old_runtime_would_answer_wrongly() -> None:
    content, images, expected, rounding = hybrid(version=3)
    (found,) = answers("tflite-runtime", content, images)
    assert (np.abs(found - expected) > 10 * rounding).any()
