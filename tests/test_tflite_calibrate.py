"""Ranges of activations over local images, and how much of them a quantized network cuts off."""

from __future__ import annotations

import numpy as np
import pytest
from tflite_int8_cases import SHAPE, Builder, conv, images, padded
from tflite_reference import evaluate

from lorac_exporters.tflite.calibrate import ranges, saturation
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.quantize import quantize
from lorac_runtime.errors import ConversionError


def two_layers() -> Network:
    b = Builder()
    b.conv(b.add("LOGISTIC", [b.conv(b.x, 4, act="RELU")], (9, 8, 4)), 5)
    return b.net()


def test_ranges_are_those_of_every_activation_over_all_images() -> None:
    network, x = two_layers(), images(count=21)
    expected = evaluate(network, x)
    found = ranges(network, x, batch=4)
    assert set(found) == set(expected)
    for name, limits in found.items():
        np.testing.assert_allclose(limits, (expected[name].min(), expected[name].max()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_size_of_a_batch_changes_no_range(batch: int) -> None:
    network, x = two_layers(), images(count=15)
    found, expected = ranges(network, x, batch=batch), ranges(network, x, batch=15)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int]] = []
    ranges(conv(), images(count=11), batch=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 11), (8, 11), (11, 11)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (images(count=20, shape=(8, 8, 6)), r"are float32 \(20, 8, 8, 6\), expected float32 \(N, 9, 8, 6\)"),
        (images(count=20).transpose(0, 3, 1, 2), r"are float32 \(20, 6, 9, 8\), expected float32 \(N, 9, 8, 6\)"),
        (images(count=20)[..., None], r"expected float32 \(N, 9, 8, 6\)"),
        (images(count=20).astype(np.float64), r"are float64 .*expected float32"),
        (images(count=20).astype(np.uint8), r"are uint8 .*expected float32"),
        (images(count=9), r"9 calibration images are too few: give at least 10"),
        (images(count=0), r"0 calibration images are too few"),
        (np.where(images(count=20) > 2, np.float32(np.nan), images(count=20)), r"not finite"),
        (np.where(images(count=20) > 2, np.float32(np.inf), images(count=20)), r"not finite"),
    ],
)
def test_images_that_do_not_fit_are_refused(bad: np.ndarray, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        ranges(conv(), bad)


def test_a_network_with_two_inputs_is_refused() -> None:
    network = conv()
    network.inputs.append(network.operators[0].inputs[1])  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="one input, this one has 2"):
        ranges(network, images(count=20))


def test_padding_with_minus_infinity_does_not_widen_the_range_of_what_is_padded() -> None:
    network, x = padded(float(np.finfo(np.float32).min)), images(count=20)
    quantize(network, ranges(network, x))
    scale = next(t.quantization for t in network.tensors() if t.quantization is not None)
    assert scale.scale[0] < 0.1


def test_nothing_is_cut_off_within_the_calibrated_range_and_much_beyond_it() -> None:
    network, x = two_layers(), images(count=20)
    quantize(network, ranges(network, x))
    within, beyond = saturation(network, x), saturation(network, 3 * x)
    stored = [t.name for t in network.tensors() if t.dtype == "int8" and t.data is None]
    assert list(within) == [name for name in stored if "logistic" not in name]
    assert max(within.values()) < 0.002
    expected = float(np.mean(np.abs(3 * x - 0.5 * (x.max() + x.min())) >= 0.5 * np.ptp(x)))
    assert beyond["x_int8"] == pytest.approx(expected, abs=0.01)
    assert beyond["x_int8"] > 0.1


def test_zeros_behind_a_relu_are_not_cut_off() -> None:
    b = Builder()
    b.conv(b.conv(b.x, 4, act="RELU"), 5)
    network, x = b.net(), images(count=20)
    hidden = network.operators[0].outputs[0].name
    assert np.mean(evaluate(network, x)[hidden] == 0) > 0.2
    quantize(network, ranges(network, x))
    assert saturation(network, x)[hidden] < 0.002


def test_saturation_of_a_float_network_is_refused() -> None:
    with pytest.raises(ConversionError, match="no int8 activations"):
        saturation(conv(), np.zeros((1, *SHAPE), np.float32))
