"""Data sets by name, .npz files and class folders: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from cifar_files import cifar10_files
from hypothesis import given
from hypothesis import strategies as st

from lorac_deploy._torchvision import datasets
from lorac_deploy.data import (
    NORMALIZATIONS,
    Dataset,
    has_test_split,
    input_spec,
    load_dataset,
    split_validation,
)
from lorac_runtime.errors import DataError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def npz(path: Path, images: np.ndarray, labels: object) -> Path:
    np.savez(path, images=images, labels=np.asarray(labels))
    return path


def class_folders(root: Path, layout: dict[str, list[tuple[int, int]]]) -> Path:
    """PNG files of the given (height, width) in one folder per class."""
    for name, sizes in layout.items():
        (root / name).mkdir(parents=True)
        for index, size in enumerate(sizes):
            PIL.Image.fromarray(pixels(*size, 3)).save(root / name / f"{index}.png")
    return root


def test_digits_are_split_for_good_and_without_overlap() -> None:
    train, test = load_dataset("digits", size=(8, 8)), load_dataset("digits", split="test", size=(8, 8))
    assert len(train) + len(test) == 1797
    np.testing.assert_allclose(np.bincount(test.labels) / np.bincount(train.labels), 3 / 7, atol=0.01)
    assert train.class_names == tuple("0123456789")
    # The very images of the test part: a base trained by an older version must not have seen them.
    assert hashlib.sha256(test.images.tobytes()).hexdigest().startswith("6586305a")
    assert not {image.tobytes() for image in test.images} & {image.tobytes() for image in train.images}


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'lorac-deploy\[demo\]'"):
        load_dataset("digits")


def test_digits_keep_scikit_learns_pixels_at_their_own_size() -> None:
    from sklearn.datasets import load_digits

    both = [load_dataset("digits", split=s, size=(8, 8), channels=1) for s in ("train", "test")]
    found = np.sort(np.concatenate([d.images for d in both]).reshape(-1, 64), axis=0)
    expected = np.sort(np.rint(load_digits().data * 255 / 16).astype(np.uint8), axis=0)
    np.testing.assert_array_equal(found, expected)


def test_digits_are_enlarged_bilinearly_and_grey_in_three_channels() -> None:
    small, large = load_dataset("digits", size=(8, 8), channels=1), load_dataset("digits")
    assert large.shape == (3, 32, 32)
    assert np.ptp(large.images, axis=3).max() == 0
    first = PIL.Image.fromarray(small.images[0, :, :, 0]).resize((32, 32), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(large.images[0, :, :, 0], np.asarray(first))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_images_are_read_in_either_layout(tmp_path: Path, layout: str) -> None:
    images = pixels(4, 6, 5, 3)
    stored = images if layout == "NHWC" else images.transpose(0, 3, 1, 2)
    found = load_dataset(npz(tmp_path / "a.npz", stored, [0, 1, 2, 0]))
    np.testing.assert_array_equal(found.images, images)
    assert found.labels.tolist() == [0, 1, 2, 0]
    assert found.labels.dtype == np.int64
    assert found.class_names == ("0", "1", "2")


def test_npz_grey_images_need_no_channel_axis_and_become_three_channels(tmp_path: Path) -> None:
    images = pixels(2, 6, 5)
    path = npz(tmp_path / "a.npz", images, [1, 0])
    np.testing.assert_array_equal(load_dataset(path).images, np.repeat(images[..., None], 3, axis=3))
    np.testing.assert_array_equal(load_dataset(path, channels=1).images, images[..., None])


def test_colours_become_grey_by_luma(tmp_path: Path) -> None:
    images = pixels(2, 6, 5, 3)
    found = load_dataset(npz(tmp_path / "a.npz", images, [1, 0]), channels=1).images
    np.testing.assert_allclose(found, images @ np.array([[0.299], [0.587], [0.114]]), atol=1)


def test_images_are_stretched_to_the_size_asked_for(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", np.full((2, 6, 5, 3), 77, np.uint8), [1, 0])
    found = load_dataset(path, size=(3, 10))
    assert found.shape == (3, 3, 10)
    assert set(np.unique(found.images)) == {77}


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "are float32, expected uint8"),
        (np.zeros((2, 4, 4, 5), np.uint8), [0, 1], r"shape \(2, 4, 4, 5\)"),
        (np.zeros((2, 4), np.uint8), [0, 1], r"shape \(2, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 1], "2 images and labels of shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0], [1]], r"labels of shape \(2, 1\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, np.nan], "are float64, expected integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), [-1, 1], "run from -1 to 1"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 10**12], "to 1000000000000, expected class numbers"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), "holds no images"),
    ],
)
def test_unusable_npz_files_are_refused(tmp_path: Path, images: np.ndarray, labels: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_dataset(npz(tmp_path / "a.npz", images, labels))


def test_a_pickle_inside_an_npz_is_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1, int))
    with pytest.raises(DataError, match=r"not a readable \.npz of plain arrays"):
        load_dataset(tmp_path / "a.npz")


def test_class_folders_name_the_classes_in_alphabetic_order(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"dog": [(6, 5)] * 2, "cat": [(6, 5)], ".git": [(6, 5)]})
    (root / "README.txt").write_text("not an image")
    found = load_dataset(root)
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(found.images[0], np.asarray(PIL.Image.open(root / "cat" / "0.png")))


def test_class_folders_of_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"cat": [(6, 5)], "dog": [(9, 9)]})
    with pytest.raises(DataError, match=r"different sizes \(6 x 5, 9 x 9, \.\.\.\): .*--size"):
        load_dataset(root)
    assert load_dataset(root, size=(8, 8)).images.shape == (2, 8, 8, 3)


def test_photographs_are_turned_upright_as_their_exif_says(tmp_path: Path) -> None:
    image, exif = PIL.Image.fromarray(np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None], 20, 0)), PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.jpg", exif=exif, quality=100)
    found = load_dataset(tmp_path, channels=1)
    assert found.shape == (1, 30, 20)
    assert found.images[0, :, 0, 0].tolist() == pytest.approx(list(range(0, 240, 8)), abs=2)


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2), ("val", 1)):
        class_folders(tmp_path / split, {"cat": [(6, 5)] * count, "dog": [(6, 5)]})
    (tmp_path / "LICENCE").write_text("")
    assert has_test_split(tmp_path)
    assert len(load_dataset(tmp_path)) == 4
    assert len(load_dataset(tmp_path, split="test")) == 3


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"train": [(6, 5)], "bus": [(6, 5)]})
    assert load_dataset(tmp_path).class_names == ("bus", "train")
    assert not has_test_split(tmp_path)


@pytest.mark.parametrize("name", ["a.npz", "folder"])
def test_data_without_a_test_part_is_not_passed_off_as_one(tmp_path: Path, name: str) -> None:
    npz(tmp_path / "a.npz", pixels(2, 4, 4, 3), [0, 1])
    class_folders(tmp_path / "folder", {"a": [(4, 4)], "b": [(4, 4)]})
    assert not has_test_split(tmp_path / name)
    with pytest.raises(DataError, match="has no test part; give the file or folder"):
        load_dataset(tmp_path / name, split="test")


def test_every_unreadable_image_is_listed(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a": [(4, 4)], "b": [(4, 4)]})
    (root / "a" / "x.png").write_bytes(b"no image")
    (root / "b" / "y.png").write_bytes((root / "b" / "0.png").read_bytes()[:60])
    PIL.Image.fromarray(np.zeros((4, 4), np.uint16)).save(root / "b" / "z.png")
    with pytest.raises(DataError, match=r"(?s)cannot be used:.*x\.png: not a readable.*y\.png.*z\.png: mode I;16"):
        load_dataset(root)


@pytest.mark.parametrize(
    ("source", "text"),
    [("nowhere.npz", "no data 'nowhere.npz': give one of digits, cifar10"), ("cifar10", "say which folder holds it")],
)
def test_absent_data_are_explained(source: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_dataset(source)


def test_an_empty_folder_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images: expected one sub-folder"):
        load_dataset(tmp_path)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split 'val' is not one of train, test"):
        load_dataset("digits", split="val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        load_dataset("digits", channels=4)
    with pytest.raises(ValueError, match=r"size must be positive, got \(0, 3\)"):
        load_dataset("digits", size=(0, 3))


def test_cifar10_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = cifar10_files(tmp_path, monkeypatch)
    train, test = (load_dataset("cifar10", split=s, root=tmp_path) for s in ("train", "test"))
    np.testing.assert_array_equal(train.images, images[:10])
    np.testing.assert_array_equal(test.images, images[10:])
    assert test.labels.tolist() == [5, 6]
    assert test.class_names == tuple("abcdefghij")


def test_an_absent_cifar_asks_for_the_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unpack https?://\S+ there, or ask for the download"):
        load_dataset("cifar100", root=tmp_path)


def test_a_failed_download_says_what_to_fetch_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(DataError, match=r"cannot be downloaded .*: fetch http://127\.0\.0\.1:9/cifar\.tar\.gz"):
        load_dataset("cifar10", root=tmp_path, download=True)


@given(st.integers(1, 3), st.integers(0, 100))
def test_normalisation_from_data_gives_mean_zero_and_deviation_one(channels: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    spec = input_spec(images)
    normalised = (images * spec.scale - spec.mean) / spec.std
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2)), 1, atol=1e-4)
    assert spec.shape == (channels, 4, 6)


def test_a_flat_channel_has_a_usable_deviation() -> None:
    assert input_spec(np.full((2, 4, 4, 1), 9, np.uint8)).std == (pytest.approx(1 / 255, abs=1e-6),)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_known_normalisations_are_for_three_channels(name: str) -> None:
    assert (input_spec(pixels(1, 4, 4, 3), name).mean, input_spec(pixels(1, 4, 4, 3), name).std) == NORMALIZATIONS[name]
    with pytest.raises(ValueError, match="does not serve images of 1 channels"):
        input_spec(pixels(1, 4, 4, 1), name)


def test_an_unknown_normalisation_is_named() -> None:
    with pytest.raises(ValueError, match="normalization 'svhn'"):
        input_spec(pixels(1, 4, 4, 3), "svhn")


def test_validation_is_stratified_seeded_and_disjoint() -> None:
    labels = np.repeat(np.arange(4), 10)
    data = Dataset(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), labels, tuple("abcd"))
    train, held_out = split_validation(data, 0.2, 0)
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2, 2]
    assert sorted([*train.images.ravel(), *held_out.images.ravel()]) == list(range(40))
    again, other = split_validation(data, 0.2, 0)[1], split_validation(data, 0.2, 1)[1]
    np.testing.assert_array_equal(held_out.images, again.images)
    assert not np.array_equal(held_out.images, other.images)


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (np.zeros((2, 4, 4, 3)), np.array([0, 1]), "must be uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), np.array([0, 1]), r"got uint8 \(2, 4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0]), "2 images need as many int64 labels"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1], np.int32), "got int32"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2]), "labels must be 0 to 1, got 0 to 2"),
    ],
)
def test_a_dataset_checks_that_its_parts_fit(images: np.ndarray, labels: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Dataset(images, labels, ("a", "b"))
