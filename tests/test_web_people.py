"""The page as people meet it: wrong files, damaged sites, keyboards, phones, light and dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import CONTRAST, launched
from web_pages import Opened, trained, windows, write_sites


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return write_sites(tmp_path_factory.mktemp("web"), root, "whole")


@pytest.fixture
def opened(browser: Any, home: Path) -> Iterator[Opened]:
    yield from windows(browser, home)


def test_files_that_are_no_images_are_named_and_the_others_taken(opened: Opened, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (10, 10), (200, 0, 0)).save(tmp_path / "good.png")
    Image.new("RGB", (30, 20), (0, 200, 0)).save(tmp_path / "large.png")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    page = opened()
    page.set_input_files("#add-0", [tmp_path / n for n in ("good.png", "large.png", "notes.txt", "broken.png")])
    page.wait_for_selector("#image-notes .good")
    said = page.inner_text("#image-notes")
    assert "notes.txt is not an image" in said
    assert "broken.png is not an image" in said
    assert "2 images added. 1 of them had another size" in said
    assert "No images of 3 of the 4 classes (b, c, d)" in page.inner_text("#counts")
    page.click("#train")
    assert "training on one class teaches a model to always answer it" in page.inner_text("#training-notes .problem")
    page.get_by_role("button", name="Remove good.png").click()
    assert "1 images of 1 classes" in page.inner_text("#counts")


def test_a_folder_gives_its_classes_and_unknown_ones_are_named(opened: Opened, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b", "zebra"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (10, 10)).save(tmp_path / "data" / name / "1.png")
    page = opened()
    page.set_input_files("#folder", tmp_path / "data")
    page.wait_for_selector("#image-notes .good")
    assert "zebra: no class of the model has this name" in page.inner_text("#image-notes")
    assert "2 images of 2 classes" in page.inner_text("#counts")


def test_images_can_be_saved_and_opened_again(opened: Opened, home: Path) -> None:
    page = opened()
    page.set_input_files("#npz", home / "local.npz")
    page.wait_for_selector("#image-notes .good")
    with page.expect_download() as download:
        page.click("#save-images")
    with np.load(io.BytesIO(Path(download.value.path()).read_bytes())) as file, np.load(home / "local.npz") as own:
        np.testing.assert_array_equal(file["images"], own["images"])
        np.testing.assert_array_equal(file["labels"], own["labels"])


def test_an_altered_file_of_the_site_is_refused_by_name(opened: Opened, home: Path) -> None:
    page = opened()
    body = bytearray((home / "whole" / "base.onnx").read_bytes())
    body[-1] ^= 1
    page.context.route("**/base.onnx", lambda route: route.fulfill(body=bytes(body)))
    assert "base.onnx was altered" in trained(page, home).inner_text("#training-notes .problem")


def test_a_file_that_is_gone_is_named(opened: Opened) -> None:
    page = opened()
    page.context.route("**/site.json", lambda route: route.fulfill(status=404))
    page.reload()
    page.wait_for_selector("#problem:not([hidden])")
    assert "site.json could not be loaded (404)" in page.inner_text("#problem")


def test_closing_the_tab_asks_first_where_something_would_be_lost(opened: Opened, home: Path) -> None:
    page = opened()
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.set_input_files("#npz", home / "local.npz")
    page.wait_for_selector("#image-notes .good")
    page.click("h2")  # browsers ask only where somebody did something
    page.close(run_before_unload=True)
    page.wait_for_timeout(300)
    assert asked == ["beforeunload"]


def test_opened_as_a_file_it_says_how_to_open_it(browser: Any, home: Path) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto((home / "whole-site" / "index.html").as_uri())
        page.wait_for_selector("#not-started", state="visible")
        assert "python3 -m http.server" in page.inner_text("#not-started")


def test_drawing_and_training_need_no_mouse(opened: Opened) -> None:
    page = opened()
    for name in ("a", "b"):
        page.get_by_role("button", name=f"Draw {name}").press("Enter")
        for key in ["ArrowLeft"] * 3 + ["Shift+ArrowDown"] * 8:
            page.keyboard.press(key)
        for count in range(1, 5):
            page.keyboard.press("Shift+ArrowRight")
            page.locator("#draw-add").press("Enter")
            assert f"has {count} image" in page.inner_text("#draw-count")
            page.locator("#canvas").focus()
        page.keyboard.press("Escape")
        assert not page.locator("#draw").is_visible()
    page.locator("#set-epochs").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    page.locator("#train").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "result-title"


def test_an_empty_drawing_is_not_added(opened: Opened) -> None:
    page = opened()
    page.get_by_role("button", name="Draw a").click()
    page.click("#draw-add")
    assert "nothing on the paper" in page.inner_text("#draw-count")
    assert "0 images" in page.inner_text("#classes li >> nth=0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_text_stands_out(opened: Opened, home: Path, scheme: str) -> None:
    page = opened(width=360, color_scheme=scheme, has_touch=True, is_mobile=True)
    trained(page, home, epochs=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    heights = page.locator("#training button:visible, #result button, .bar > .button").evaluate_all(
        "(all) => all.map((b) => b.getBoundingClientRect().height)"
    )
    assert min(heights) >= 40
    for selector in (
        "p",
        "h1",
        "h2",
        "h3",
        ".hint",
        "button.main",
        "label",
        ".notice",
        ".figures dd",
        ".figures dt",
        "footer p",
    ):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    page.get_by_role("button", name="Draw a").click()
    box = page.locator("#draw").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_every_control_has_a_name(opened: Opened, home: Path) -> None:
    page = trained(opened(), home, epochs=1)
    nameless = page.locator("button, input, select, canvas[tabindex]").evaluate_all(
        "(all) => all.filter((e) => !(e.ariaLabel || e.innerText?.trim() || e.labels?.length)).map((e) => e.id)"
    )
    assert nameless == []
