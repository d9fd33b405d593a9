"""Local data in folders of images, with classes and without. Pillow is an extra: most are skipped without it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_images import COLOUR, GREY, NAMES, load, npz, pixels, refusal

from lorac_runtime.data import load_data
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec


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


def test_missing_labels_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    text = refusal(npz(tmp_path, images=pixels(3, 4, 5, 3)))
    assert "has no labels, only ['images']; save it with numpy.savez(path, images=..., labels=...)" in text
    assert "methods tent and recalibrate" in text
    for name in "ab":
        picture(tmp_path / "photos" / f"{name}.png")
    text = refusal(tmp_path / "photos")
    assert "holds 2 images without labels" in text
    assert "into a sub-folder with the name of the class" in text


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
