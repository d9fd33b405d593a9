"""Data of studies: vendors held out, fans by room, labels that turn or lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_deploy.study_data import CONDITIONS, fan_spectra, flip, vendor_split, with_wrong
from lorac_runtime.errors import DataError

RNG = np.random.default_rng(0)
SEQUENCES = [
    "12cm_hmlo_normal_silentA_1",
    "12cm_hmlo_damage1_silentA_1",
    "12cm_hmlo_damage2_silentB_2",
    "12cm_hmlo_normal_noisy_1",
    "12cm_l_normal_silentA",
    "14cm_hmlo_normal_silentA_1",
]


def icons(path: Path, **changes: object) -> Path:
    arrays: dict[str, object] = {
        "x": RNG.integers(0, 256, (12, 8, 8, 3), np.uint8),
        "y": np.arange(12, dtype=np.uint8) % 4,
        "vendor": np.arange(12, dtype=np.uint8) % 3,
        "vendor_names": np.array(["apple", "htc", "lg"]),
        "class_names": np.array(["bell", "car", "dog", "eye"]),
    }
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez(path / "icons.npz", **arrays)  # type: ignore[arg-type]
    return path / "icons.npz"


def fans(path: Path, per_sequence: int = 3) -> Path:
    sequence = np.repeat(np.arange(len(SEQUENCES)), per_sequence).astype(np.int16)
    x = sequence[:, None] + np.arange(8) / 8
    np.savez(path / "fans.npz", x=x.astype(np.float32), sequence=sequence, sequence_names=np.array(SEQUENCES))
    return path / "fans.npz"


@pytest.mark.parametrize("named", [False, True])
def test_a_held_out_vendor_is_in_one_part_and_nobody_else_is(tmp_path: Path, named: bool) -> None:
    names = np.array(["apple", "htc", "lg"])[np.arange(12) % 3]
    path = icons(tmp_path, **({"vendor": names, "vendor_names": None} if named else {}))
    others, held_out = vendor_split(path, "htc")
    stored = np.load(path)
    inside = np.arange(12) % 3 == 1
    for found, chosen in ((others, ~inside), (held_out, inside)):
        np.testing.assert_array_equal(found.images, stored["x"][chosen])
        np.testing.assert_array_equal(found.labels, stored["y"][chosen])
        assert found.class_names == ("bell", "car", "dog", "eye")


def test_without_class_names_classes_are_numbered(tmp_path: Path) -> None:
    assert vendor_split(icons(tmp_path, class_names=None), "lg")[0].class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("changes", "vendor", "text"),
    [
        ({}, "nokia", "no images of vendor 'nokia'; there are apple, htc, lg"),
        ({"vendor": None}, "htc", "has no vendor, expected x, y, vendor"),
        ({"vendor": np.full(12, 3)}, "htc", "numbers of the 3 vendor_names"),
        ({"vendor": np.zeros(5, int)}, "apple", r"one entry of each for every sample, got x \(12, 8, 8, 3\)"),
        ({"y": np.zeros(12)}, "apple", "y of .* is float64"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, object], vendor: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        vendor_split(icons(tmp_path, **changes), vendor)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("text.npz", "single.npy", "missing.npz"):
        with pytest.raises(DataError, match="is not a readable"):
            vendor_split(tmp_path / name, "apple")


def test_spectra_are_labelled_by_condition_and_chosen_by_room(tmp_path: Path) -> None:
    path = fans(tmp_path)
    silent = fan_spectra(path, ("silentA", "silentB"), bins=8)
    assert silent.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (silent.shape, silent.class_names, silent.key) == ((8,), CONDITIONS, "samples")
    np.testing.assert_array_equal(silent.images[:, 0], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert fan_spectra(path, ("noisy",), bins=8).images[:, 0].tolist() == [3, 3, 3]
    assert fan_spectra(path, ("silentA",), speeds=("l",), bins=8).images[:, 0].tolist() == [4, 4, 4]
    assert fan_spectra(path, ("silentA",), fan="14cm", bins=8).images[:, 0].tolist() == [5, 5, 5]
    assert fan_spectra(path, ("silentA", "silentB"), recordings=("2",), bins=8).labels.tolist() == [2, 2, 2]


def test_fewer_bins_are_means_of_neighbours(tmp_path: Path) -> None:
    path = fans(tmp_path)
    whole, half = (fan_spectra(path, ("noisy",), bins=bins).images for bins in (8, 4))
    np.testing.assert_allclose(half, (whole[:, ::2] + whole[:, 1::2]) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"bins must divide the \(8,\) bins"):
        fan_spectra(path, ("noisy",), bins=3)


def test_an_unknown_room_is_refused_with_the_sequences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 12cm_hmlo_damage1_silentA_1, 12cm"):
        fan_spectra(fans(tmp_path), ("loud",), bins=8)


@given(st.lists(st.integers(0, 6), max_size=50), st.integers(7, 9))
def test_flipping_twice_is_no_change_and_once_is_its_formula(labels: list[int], classes: int) -> None:
    given_labels = np.array(labels, np.int64)
    flipped = flip(given_labels, classes)
    assert flipped.tolist() == [classes - 1 - label for label in labels]
    np.testing.assert_array_equal(flip(flipped, classes), given_labels)


@given(st.integers(0, 200), st.floats(0, 1), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_exactly_the_share_is_wrong_and_every_wrong_label_is_a_class(
    n: int, share: float, classes: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, n)
    wrong = with_wrong(labels, share, classes, seed)
    assert int((wrong != labels).sum()) == round(share * n)
    assert not n or (wrong.min() >= 0 and wrong.max() < classes)
    np.testing.assert_array_equal(wrong, with_wrong(labels, share, classes, seed))


def test_wrong_labels_take_every_other_class_and_other_seeds_other_samples() -> None:
    labels = np.full(3000, 1, np.int64)
    counts = np.bincount(with_wrong(labels, 1.0, 4, 0), minlength=4)
    assert counts[1] == 0
    assert counts[[0, 2, 3]].min() > 900
    first, second = (np.flatnonzero(with_wrong(labels, 0.1, 4, seed) != 1) for seed in (0, 1))
    assert set(first) != set(second)


@pytest.mark.parametrize("call", [lambda y: flip(y, 2), lambda y: with_wrong(y, 0.1, 2, 0)])
def test_labels_beyond_the_classes_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="labels must be 0 to 1, got 0 to 2"):
        call(np.array([0, 2]))  # type: ignore[operator]
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        with_wrong(np.array([0, 1]), 1.5, 2, 0)


@pytest.mark.realdata
def test_icons_of_a_vendor_are_as_many_as_the_file_says(realdata: Path) -> None:
    others, held_out = vendor_split(realdata / "icons50_32x32.npz", "apple")
    assert (len(others), len(held_out), len(others.class_names), others.shape) == (8954, 1046, 50, (3, 32, 32))


@pytest.mark.realdata
def test_fans_in_quiet_and_noisy_rooms_have_three_conditions(realdata: Path) -> None:
    path = realdata / "cooling_fan_spectra.npz"
    silent, noisy = fan_spectra(path, ("silentA", "silentB"), bins=256), fan_spectra(path, ("noisy",), bins=256)
    assert np.bincount(silent.labels).tolist() == [940] * 3
    assert np.bincount(noisy.labels).tolist() == [470] * 3
    assert silent.shape == (256,)
    assert noisy.images.mean() > silent.images.mean()
