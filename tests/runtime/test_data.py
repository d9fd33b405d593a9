"""Local data in .npz files: what is read, and everything that is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_images import COLOUR, GREY, load, npz, pixels, refusal

from lorac_runtime.data import load_data
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.int64, np.uint64, ">i4"])
def test_images_of_either_channel_order_become_nhwc(tmp_path: Path, kind: str) -> None:
    images, labels = pixels(3, 4, 5, 3), np.array([2, 0, 1]).astype(kind)
    last = load(npz(tmp_path, images=images, labels=labels))
    first = load(npz(tmp_path, images=images.transpose(0, 3, 1, 2), labels=labels))
    for found in (last, first):
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, [2, 0, 1])
        assert (found.images.dtype, found.labels.dtype, len(found)) == (np.uint8, np.int64, 3)
        assert found.labels.dtype.isnative


def test_classes_without_a_sample_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = npz(tmp_path, images=pixels(2, 4, 5, 3), labels=np.array([0, 2]))
    load(few, require_classes=1)
    assert not caplog.records
    load(few)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "local.npz has no images of 1 of the 3 classes (bee): " in caplog.text
    caplog.clear()
    load(npz(tmp_path, images=pixels(3, 4, 5, 3), labels=np.array([0, 2, 1])))
    assert not caplog.records


def test_many_absent_classes_are_counted_and_the_first_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"class{i}" for i in range(40)]
    load_data(npz(tmp_path, images=pixels(2, 4, 5, 3), labels=np.array([0, 39])), COLOUR, 40, names)
    assert "no images of 38 of the 40 classes (class1, class2, class3, class4, class5, ...): " in caplog.text


def test_images_of_one_channel_may_lack_the_channel_axis(tmp_path: Path) -> None:
    images = pixels(2, 4, 5)
    for stored in (images, images[..., None], images[:, None]):
        found = load(npz(tmp_path, images=stored, labels=[0, 1]), GREY)
        np.testing.assert_array_equal(found.images, images[..., None])
    assert "shape (2, 4, 5), expected (N, 4, 5, 3) or (N, 3, 4, 5)" in refusal(
        npz(tmp_path, images=images, labels=[0, 1])
    )


def test_where_both_orders_fit_channels_are_last(tmp_path: Path) -> None:
    images = pixels(2, 3, 3, 3)
    spec = InputSpec("input", (3, 3, 3), 1.0, (0.0,) * 3, (1.0,) * 3)
    np.testing.assert_array_equal(load(npz(tmp_path, images=images, labels=[0, 1]), spec).images, images)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 4, 3), (2, 4, 5, 1), (2, 60), (4, 5, 3), ()])
def test_images_of_another_size_are_refused_with_both_sizes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    text = refusal(npz(tmp_path, images=pixels(*shape), labels=[0, 1]))
    assert f"shape {shape}" in text
    assert "(N, 4, 5, 3) or (N, 3, 4, 5)" in text
    assert "resize" in text


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int64", "uint16", "bool", "<U3"])
def test_images_of_another_type_are_refused(tmp_path: Path, kind: str) -> None:
    text = refusal(npz(tmp_path, images=pixels(2, 4, 5, 3).astype(kind), labels=[0, 1]))
    assert f"images of {tmp_path / 'local.npz'} are {np.dtype(kind)}, expected uint8" in text
    assert "NaN" not in text


def test_nan_in_images_and_labels_is_named(tmp_path: Path) -> None:
    images = pixels(2, 4, 5, 3).astype(np.float32)
    images[1, 2, 3] = np.nan
    assert "hold NaN (3 of 120 values)" in refusal(npz(tmp_path, images=images, labels=[0, 1]))
    text = refusal(npz(tmp_path, images=pixels(2, 4, 5, 3), labels=[0, np.nan]))
    assert "labels" in text
    assert "float64 and hold NaN (1 of 2 values), expected integers 0 to 2" in text


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False], ["ant", "bee"]])
def test_labels_that_are_no_integers_are_refused(tmp_path: Path, labels: list[object]) -> None:
    assert "expected integers 0 to 2" in refusal(npz(tmp_path, images=pixels(2, 4, 5, 3), labels=labels))


def test_labels_out_of_range_are_named_with_their_number(tmp_path: Path) -> None:
    labels = np.array([0, 1, 3, 3, -1])
    text = refusal(npz(tmp_path, images=pixels(5, 4, 5, 3), labels=labels))
    assert "must be 0 to 2, for 3 classes, but there are -1 (1 times), 3 (2 times)" in text
    text = refusal(npz(tmp_path, images=pixels(1, 4, 5, 3), labels=np.array([2**63], np.uint64)))
    assert "9223372036854775808 (1 times)" in text
    text = refusal(npz(tmp_path, images=pixels(99, 4, 5, 3), labels=np.arange(99)))
    assert "and 86 more" in text


def test_labels_must_be_one_per_image(tmp_path: Path) -> None:
    assert "3 images but 2 labels" in refusal(npz(tmp_path, images=pixels(3, 4, 5, 3), labels=[0, 1]))
    one_hot = np.eye(3, dtype=np.int64)
    assert "shape (3, 3), expected one class number" in refusal(
        npz(tmp_path, images=pixels(3, 4, 5, 3), labels=one_hot)
    )


def test_empty_data_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, images=pixels(0, 4, 5, 3), labels=np.zeros(0, np.int64))
    assert "holds no images" in refusal(path)
    with pytest.raises(DataError, match="holds no images"):
        load(path, require_classes=0)


def test_a_single_class_is_refused_for_training_only(tmp_path: Path) -> None:
    path = npz(tmp_path, images=pixels(4, 4, 5, 3), labels=[1, 1, 1, 1])
    text = refusal(path)
    assert "all 4 images" in text
    assert "'bee'" in text
    assert len(load(path, require_classes=1)) == 4


def test_missing_keys_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    text = refusal(npz(tmp_path, x=pixels(2, 4, 5, 3), labels=[0, 1]))
    assert "has no images, only ['x', 'labels']" in text
    assert "has no images and no labels" in refusal(npz(tmp_path, x=[1]))


class Boom:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    objects = np.array([Boom(trace), 1], dtype=object)
    assert "not a readable .npz of plain arrays" in refusal(npz(tmp_path, images=objects, labels=[0, 1]))
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Boom(trace)))
    assert "not a readable .npz" in refusal(tmp_path / "a.npz")
    assert not trace.exists()


def test_a_lone_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2, 4, 5, 3))
    assert "holds a single array" in refusal(tmp_path / "a.npy")


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'a.npz'} cannot be read" in refusal(tmp_path / "a.npz")
    assert "cannot be read" in refusal(tmp_path / ("a" * 300))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_a_data_error(tmp_path_factory: pytest.TempPathFactory, save: object, cut: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.npz"
    save(path, images=pixels(2, 4, 5, 3), labels=[0, 1])  # type: ignore[operator]
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(DataError):
        load(path)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


BAD_HEADERS = [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 5, 3",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 4, 5, 3)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 30 + ",)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999999,)}",
    "{'descr': ('x',), 'fortran_order': False, 'shape': (2,)}",
    "{'descr': 'nothing', 'fortran_order': False, 'shape': (2,)}",
    "{1: 2, 'a': 3}",
    "'''",
    "(" * 200,
    "__import__('os')",
    "",
]


@pytest.mark.filterwarnings("ignore")  # numpy's remarks on such headers differ between its versions
@pytest.mark.parametrize("text", BAD_HEADERS)
def test_a_damaged_array_header_is_a_data_error(tmp_path: Path, text: str) -> None:
    labels = io.BytesIO()
    np.save(labels, np.array([0, 1]))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header(text) + bytes(120))
        archive.writestr("labels.npy", labels.getvalue())
    refusal(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore")
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_a_data_error_or_change_nothing_but_data(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.npz"
    np.savez(path, images=pixels(2, 4, 5, 3), labels=[0, 1])
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    try:
        assert load(path).images.shape == (2, 4, 5, 3)
    except DataError as err:
        assert str(path) in str(err)  # noqa: PT017 - both outcomes are right


def test_labels_may_be_missing_where_none_are_needed(tmp_path: Path) -> None:
    images = pixels(3, 4, 5, 3)
    found = load(npz(tmp_path, images=images), require_classes=0)
    np.testing.assert_array_equal(found.images, images)
    assert (found.labels, len(found)) == (None, 3)
    with pytest.raises(DataError, match="3 samples without labels"):
        found.known_labels()
    given = load(npz(tmp_path, images=images, labels=[0, 0, 0]), require_classes=0)  # one class teaches nothing wrong
    np.testing.assert_array_equal(given.known_labels(), [0, 0, 0])


@pytest.mark.parametrize(("labels", "words"), [([0, 3, 1], "must be 0 to 2"), ([0, 1], "3 images but 2 labels")])
def test_labels_that_are_there_are_checked_even_where_none_are_needed(
    tmp_path: Path, labels: list[int], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        load(npz(tmp_path, images=pixels(3, 4, 5, 3), labels=labels), require_classes=0)
