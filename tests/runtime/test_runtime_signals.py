"""Signals on a device: what is read, what is refused, and the numbers that a model gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.data import LocalData, fingerprint, load_data, preprocess
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.manifest_checks import input_problems

NAMES = ("idle", "sound", "worn")
SPECTRA = InputSpec("input", (6,), 2.0, (0.5,), (4.0,), dtype="float32")
WAVES = InputSpec("input", (2, 5), 0.5, (0.5, -1.0), (0.25, 3.0), dtype="float32")
BOTH = pytest.mark.parametrize("spec", [SPECTRA, WAVES], ids=["features", "channels"])


def values(spec: InputSpec, count: int = 4, kind: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *spec.shape)).astype(kind)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "local.npz", **arrays)  # type: ignore[arg-type]
    return folder / "local.npz"


def load(path: Path, spec: InputSpec) -> LocalData:
    return load_data(path, spec, len(NAMES), NAMES)


def refusal(path: Path, spec: InputSpec) -> str:
    with pytest.raises(DataError) as caught:
        load(path, spec)
    return str(caught.value)


@BOTH
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_of_any_width_become_float32_in_the_same_order_of_axes(
    tmp_path: Path, spec: InputSpec, kind: Any
) -> None:
    samples = values(spec, kind=kind)
    found = load(npz(tmp_path, samples=samples, labels=[0, 1, 2, 0]), spec)
    np.testing.assert_array_equal(found.images, samples.astype(np.float32))
    assert (found.images.dtype, found.images.flags.c_contiguous, len(found)) == (np.float32, True, 4)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, bool, np.complex64])
def test_numbers_that_are_no_floats_are_refused_with_their_type(tmp_path: Path, kind: Any) -> None:
    text = refusal(npz(tmp_path, samples=np.ones((2, 6), kind), labels=[0, 1]), SPECTRA)
    assert f"are {np.dtype(kind)}, expected float16, float32 or float64" in text


def test_values_that_are_not_finite_are_counted_by_kind(tmp_path: Path) -> None:
    samples = values(SPECTRA, kind=np.float64)
    samples[0, :2], samples[1, 0], samples[2, :3] = np.nan, -np.inf, 1e300
    text = refusal(npz(tmp_path, samples=samples, labels=[0, 1, 2, 0]), SPECTRA)
    assert "of the 24 values in samples of" in text
    assert "2 are NaN, 1 are infinite, 3 are beyond float32" in text


@BOTH
def test_another_shape_is_refused_with_the_one_expected(tmp_path: Path, spec: InputSpec) -> None:
    expected = ", ".join(str(size) for size in spec.shape)
    for wrong in (np.ones((4, *spec.shape, 1)), np.ones((4, spec.shape[0] + 1, *spec.shape[1:])), np.ones(4)):
        text = refusal(npz(tmp_path, samples=wrong, labels=[0, 1, 2, 0]), spec)
        assert f"have shape {wrong.shape}, expected (N, {expected})" in text


def test_the_key_of_the_other_kind_of_data_is_refused_by_name(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 5, 3), np.uint8)
    text = refusal(npz(tmp_path, images=images, labels=[0, 1]), SPECTRA)
    assert "has no samples, only ['images', 'labels']" in text
    assert "numpy.savez(path, samples=..., labels=...)" in text
    colour = InputSpec("input", (3, 4, 5), 1.0, (0.0,) * 3, (1.0,) * 3)
    assert "has no images, only" in refusal(npz(tmp_path, samples=values(SPECTRA), labels=[0, 1, 2, 0]), colour)


def test_class_folders_are_refused_for_a_model_of_signals(tmp_path: Path) -> None:
    (tmp_path / "idle").mkdir()
    assert "class folders hold images: the model takes signals of shape (6,)" in refusal(tmp_path, SPECTRA)


def test_messages_speak_of_samples(tmp_path: Path) -> None:
    samples = values(SPECTRA)
    assert "4 samples but 2 labels" in refusal(npz(tmp_path, samples=samples, labels=[0, 1]), SPECTRA)
    assert "holds no samples" in refusal(npz(tmp_path, samples=samples[:0], labels=np.zeros(0, int)), SPECTRA)
    assert "all 4 samples of" in refusal(npz(tmp_path, samples=samples, labels=[1] * 4), SPECTRA)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
)
def test_preprocessing_is_its_formula_channel_by_channel(sizes: list[int], scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels = sizes[0] if len(sizes) == 2 else 1
    mean, std = rng.normal(size=channels), rng.uniform(0.1, 3, channels)
    spec = InputSpec("x", tuple(sizes), scale, tuple(mean.tolist()), tuple(std.tolist()), dtype="float32")
    samples = rng.normal(size=(3, *sizes)).astype(np.float32)
    kept = samples.copy()
    found = preprocess(samples, spec)
    expected = np.empty(samples.shape)
    for index in np.ndindex(samples.shape):
        channel = index[1] if len(sizes) == 2 else 0
        expected[index] = (float(samples[index]) * scale - mean[channel]) / std[channel]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, scale))
    np.testing.assert_array_equal(samples, kept)  # of float32 data, too, a copy is changed
    assert (found.dtype, found.shape) == (np.float32, samples.shape)


def test_a_fingerprint_tells_signals_by_a_single_value() -> None:
    samples, labels = values(WAVES), np.array([0, 1, 2, 0])
    other = samples.copy()
    other[3, 1, 4] = np.nextafter(other[3, 1, 4], np.float32(9))
    assert fingerprint(LocalData(samples, labels)) == fingerprint(LocalData(samples.copy(), labels))
    assert fingerprint(LocalData(samples, labels)) != fingerprint(LocalData(other, labels))


Change = Callable[[InputSpec], InputSpec]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": ({"dtype": "int16"}, "input.dtype: 'int16' is not one of uint8, float32"),
    "images with two axes": ({"dtype": "uint8"}, "of uint8 images, expected (channels, height, width)"),
    "signals with three axes": ({"shape": (2, 5, 5)}, "expected (features,) or (channels, length)"),
    "no axis": ({"shape": ()}, "expected (features,) or (channels, length)"),
    "no length": ({"shape": (2, 0)}, "must be positive"),
    "normalised inside": ({"in_graph": True}, "only images are normalised inside of the graph"),
    "one mean": ({"mean": (0.5,)}, "mean and std need 2 values"),
    "a value per feature": ({"shape": (2,)}, "mean and std need 1 values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_description_that_contradicts_itself_is_refused(name: str) -> None:
    changes, text = WRONG[name]
    assert not input_problems(WAVES)
    (problem,) = input_problems(dataclasses.replace(WAVES, **changes))
    assert text in problem
