"""Local data: what is read, and everything that is refused."""

from __future__ import annotations

import io
import logging
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_runtime.data import LocalData, fingerprint, load_data, preprocess, split, stratified_split
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec

NAMES = ("ant", "bee", "cat")
COLOUR = InputSpec("input", (3, 4, 5), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputSpec("input", (1, 4, 5), 1 / 255, (0.5,), (0.2,))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "local.npz", **arrays)  # type: ignore[arg-type]
    return folder / "local.npz"


def load(path: Path, spec: InputSpec = COLOUR, *, require_classes: int = 2) -> LocalData:
    return load_data(path, spec, len(NAMES), NAMES, require_classes=require_classes)


def refusal(path: Path, spec: InputSpec = COLOUR) -> str:
    with pytest.raises(DataError) as caught:
        load(path, spec)
    return str(caught.value)


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


def test_preprocessing_is_scale_mean_and_std_per_channel() -> None:
    images = pixels(6, 4, 5, 3)
    found = preprocess(images, COLOUR)
    assert found.shape == (6, 3, 4, 5)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
        expected = (images[..., channel].astype(float) / 255 - mean) / std
        np.testing.assert_allclose(found[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_normalises_by_itself_takes_raw_images() -> None:
    images = pixels(2, 4, 5, 3)
    spec = InputSpec("input", (3, 4, 5), 1 / 255, (0.5,) * 3, (0.5,) * 3, in_graph=True)
    assert preprocess(images, spec) is images


def test_the_fingerprint_sees_images_labels_and_shape() -> None:
    data = LocalData(pixels(2, 4, 5, 3), np.array([0, 1]))
    other = data.images.copy()
    other[1, 2, 3, 0] ^= 1
    copies = [LocalData(data.images.copy(), data.labels.copy()), LocalData(np.asfortranarray(data.images), data.labels)]
    differ = [
        LocalData(other, data.labels),
        LocalData(data.images, np.array([0, 2])),
        LocalData(data.images.reshape(2, 5, 4, 3), data.labels),
    ]
    assert {fingerprint(copy) for copy in copies} == {fingerprint(data)}
    assert len({fingerprint(data), *map(fingerprint, differ)}) == 4
    assert len(fingerprint(data)) == 64


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0, 0.95),
    seed=st.integers(0, 5),
)
def test_a_split_is_complete_stratified_and_keeps_every_class_in_training(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    try:
        train, held = stratified_split(labels, fraction, seed)
    except DataError:
        assert int(len(labels) * fraction + 0.5) == 0 or max(sizes) == 1
        return
    assert sorted([*train, *held]) == list(range(len(labels)))
    np.testing.assert_array_equal(train, np.sort(train))
    np.testing.assert_array_equal(held, np.sort(held))
    assert train.dtype == held.dtype == np.int64
    counts = np.bincount(labels[held], minlength=len(sizes))
    for size, count in zip(sizes, counts, strict=True):
        assert count <= size - 1
        assert abs(count - min(size * fraction, size - 1)) < 1
    if all(size * fraction <= size - 1 for size in sizes):
        assert len(held) == int(len(labels) * fraction + 0.5)


def test_a_split_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(4), 10)
    first, again, other = (stratified_split(labels, 0.3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_nothing_is_held_out_at_fraction_zero() -> None:
    train, held = stratified_split(np.array([0, 1, 1]), 0.0, 0)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        stratified_split(np.array([0, 1]), fraction, 0)


@pytest.mark.parametrize(
    ("labels", "fraction", "needed"), [([0, 0], 0.2, 3), ([0, 1, 2, 3], 0.5, 2), ([0, 0, 1, 1], 0.01, 50), ([], 0.2, 3)]
)
def test_data_too_small_to_hold_anything_out_are_refused(labels: Sequence[int], fraction: float, needed: int) -> None:
    with pytest.raises(DataError, match=f"at least {needed} samples, two of them of the same class"):
        stratified_split(np.array(labels, np.int64), fraction, 0)
    enough = np.zeros(needed, np.int64)
    assert len(stratified_split(enough, fraction, 0)[1]) == 1


# Class folders. Pillow is an extra, so these are skipped without it.


def picture(path: Path, image: np.ndarray | None = None, mode: str | None = None) -> np.ndarray:
    """Write a small PNG; return its pixels."""
    pil = pytest.importorskip("PIL.Image")
    image = pixels(4, 5, 3) if image is None else image
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pil.fromarray(image)
    (made.convert(mode) if mode else made).save(path)
    return image


def test_class_folders_are_read_in_the_order_of_classes_then_names(tmp_path: Path) -> None:
    second = picture(tmp_path / "cat" / "a.png", pixels(4, 5, 3))
    third = picture(tmp_path / "cat" / "b.png", 255 - second)
    first = picture(tmp_path / "ant" / "z.png", second // 2)
    found = load(tmp_path)
    np.testing.assert_array_equal(found.images, [first, second, third])
    assert found.labels.tolist() == [0, 2, 2]
    turned = load_data(tmp_path, COLOUR, 3, NAMES[::-1])
    np.testing.assert_array_equal(turned.images, [second, third, first])
    assert turned.labels.tolist() == [0, 0, 2]
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)


def test_colours_are_converted_to_what_the_model_takes(tmp_path: Path) -> None:
    grey = picture(tmp_path / "ant" / "a.png", pixels(4, 5))
    picture(tmp_path / "bee" / "a.png", np.dstack([pixels(4, 5, 3), pixels(4, 5)]))  # with transparency
    picture(tmp_path / "cat" / "a.png", mode="P")
    np.testing.assert_array_equal(load(tmp_path).images[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(load(tmp_path, GREY).images[0], grey[..., None])


def test_folders_that_are_no_classes_are_all_named(tmp_path: Path) -> None:
    for name in ("ant/a.png", "wasp/a.png", "gnat/a.png"):
        picture(tmp_path / name)
    text = refusal(tmp_path)
    assert text.splitlines()[1:] == ["  - gnat", "  - wasp"]
    assert "(ant, bee, cat)" in text


def test_hidden_files_are_ignored_and_loose_files_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "ant" / "a.png")
    picture(tmp_path / "bee" / "a.png")
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "ant" / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 3
    assert not caplog.records
    (tmp_path / "labels.csv").write_text("a")
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 3
    assert "labels.csv" in caplog.text


def test_every_unusable_file_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "bee" / "good.png")
    picture(tmp_path / "ant" / "big.png", pixels(8, 9, 3))
    picture(tmp_path / "ant" / "deep.png", pixels(4, 5).astype(np.uint16))
    (tmp_path / "ant" / "text.png").write_text("no image")
    data = (tmp_path / "bee" / "good.png").read_bytes()
    (tmp_path / "ant" / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "ant" / "more").mkdir()
    lines = refusal(tmp_path).splitlines()[1:]
    expected = {
        "big.png": "is 9 x 8 pixels, expected 5 x 4 (width x height); resize it",
        "cut.png": "is not a readable image",
        "deep.png": "not 8 bits per channel",
        "more": "is a folder",
        "text.png": "is not a readable image",
    }
    assert len(lines) == len(expected)
    for line, (name, problem) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"  - {Path('ant') / name} ")
        assert problem in line


def test_long_lists_of_unusable_files_are_cut(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "ant").mkdir()
    for number in range(50):
        (tmp_path / "ant" / f"{number}.png").write_text("no image")
    lines = refusal(tmp_path).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  - and 30 more"


@pytest.mark.filterwarnings("ignore")  # what Pillow remarks on damaged files
@settings(max_examples=30)
@given(cut=st.floats(0, 0.99), place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damaged_pictures_are_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, cut: float, place: float, value: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, damaged in (("a.png", True), ("b.bmp", True), ("c.gif", True), ("d.jpg", True), ("e.tif", False)):
        picture(folder / "ant" / name)
        data = bytearray((folder / "ant" / name).read_bytes())
        data[int(place * len(data))] = value
        (folder / "ant" / name).write_bytes(data[: int((1 - cut) * len(data))] if damaged else data)
    picture(folder / "bee" / "a.png")
    try:
        assert len(load(folder)) == 6
    except DataError as err:
        assert "cannot be used" in str(err)  # noqa: PT017 - a flipped pixel is no damage


def test_links_inside_are_followed_and_links_outside_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    picture(home / "ant" / "a.png")
    picture(home / "bee" / "a.png")
    (home / "bee" / "b.png").symlink_to(home / "ant" / "a.png")
    assert len(load(home)) == 3
    picture(tmp_path / "secret" / "b.png")
    (home / "ant" / "b.png").symlink_to(tmp_path / "secret" / "b.png")
    (home / "ant" / "loop.png").symlink_to(home / "ant" / "loop.png")
    (home / "cat").symlink_to(tmp_path / "secret")
    text = refusal(home)
    assert f"{Path('ant/b.png')} is a link that leads out of the folder" in text
    assert f"{Path('cat/b.png')} is a link that leads out of the folder" in text
    assert f"{Path('ant/loop.png')} is not a readable image" in text


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "ant").mkdir()
    assert "holds no images" in refusal(tmp_path)


def test_models_of_other_channel_numbers_take_npz_files_only(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "a.png")
    spec = InputSpec("input", (2, 4, 5), 1.0, (0.0,) * 2, (1.0,) * 2)
    assert "cannot be turned into 2 channels" in refusal(tmp_path, spec)


def test_without_pillow_the_command_to_install_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.png").write_bytes(b"x")
    program = """
import sys
from pathlib import Path
sys.modules["PIL"] = None
from lorac_runtime.data import load_data
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec
try:
    load_data(Path(sys.argv[1]), InputSpec("i", (3, 4, 5), 1.0, (0.0,) * 3, (1.0,) * 3), 1, ("ant",))
except DataError as err:
    print(err)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert "pip install pillow" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_labels_may_be_missing_where_none_are_needed(tmp_path: Path) -> None:
    images = pixels(3, 4, 5, 3)
    found = load(npz(tmp_path, images=images), require_classes=0)
    np.testing.assert_array_equal(found.images, images)
    assert (found.labels, len(found)) == (None, 3)
    with pytest.raises(DataError, match="3 samples without labels"):
        found.known_labels()
    given = load(npz(tmp_path, images=images, labels=[0, 0, 0]), require_classes=0)  # one class teaches nothing wrong
    np.testing.assert_array_equal(given.known_labels(), [0, 0, 0])


def test_missing_labels_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    text = refusal(npz(tmp_path, images=pixels(3, 4, 5, 3)))
    assert "has no labels, only ['images']; save it with numpy.savez(path, images=..., labels=...)" in text
    assert "methods tent and recalibrate" in text
    for name in "ab":
        picture(tmp_path / "photos" / f"{name}.png")
    text = refusal(tmp_path / "photos")
    assert "holds 2 images without labels" in text
    assert "into a sub-folder with the name of the class" in text


@pytest.mark.parametrize(("labels", "words"), [([0, 3, 1], "must be 0 to 2"), ([0, 1], "3 images but 2 labels")])
def test_labels_that_are_there_are_checked_even_where_none_are_needed(
    tmp_path: Path, labels: list[int], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        load(npz(tmp_path, images=pixels(3, 4, 5, 3), labels=labels), require_classes=0)


def test_a_flat_folder_holds_images_without_labels_sorted_by_name(tmp_path: Path) -> None:
    from PIL import Image

    images = pixels(3, 4, 5, 3)
    for name, image in zip("cab", images, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    found = load(tmp_path, require_classes=0)
    np.testing.assert_array_equal(found.images, images[[1, 2, 0]])
    assert found.labels is None
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt is not a readable image"):
        load(tmp_path, require_classes=0)


def test_class_folders_give_labels_even_where_none_are_needed(tmp_path: Path) -> None:
    picture(tmp_path / "bee" / "a.png")
    assert load(tmp_path, require_classes=0).known_labels().tolist() == [1]


def test_a_fingerprint_tells_images_with_labels_from_those_without() -> None:
    images = pixels(2, 4, 5, 3)
    found = {fingerprint(LocalData(images, labels)) for labels in (None, np.array([0, 0]), np.array([0, 1]))}
    assert len(found) == 3


def test_without_labels_the_split_is_random_and_repeatable() -> None:
    data = LocalData(np.zeros((20, 1, 1, 1), np.uint8), None)
    train, held = split(data, 0.25, 1)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train, *held]) == list(range(20))
    np.testing.assert_array_equal(split(data, 0.25, 1)[1], held)
    assert not np.array_equal(split(data, 0.25, 2)[1], held)
    assert [len(part) for part in split(data, 0.0, 1)] == [20, 0]
    labelled = LocalData(data.images, np.arange(20) % 2)
    np.testing.assert_array_equal(split(labelled, 0.25, 1)[1], stratified_split(np.arange(20) % 2, 0.25, 1)[1])
