"""The page end to end in Chromium: the runtime's numbers, clear words for bad input, nothing sent anywhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import CONTRAST, launched
from playwright.sync_api import expect
from safetensors.numpy import load_file
from small_artifacts import NAMES, SPEC, export, network
from torch import nn
from web_pages import ISOLATED, noisy_images, onnxruntime_web, served

from lorac_deploy import cli
from lorac_deploy.web import engine_files
from lorac_deploy.web.site import write_site
from lorac_exporters.plan import LoraConfig
from lorac_runtime.adapter import check_adapter, load_adapter
from lorac_runtime.manifest import load
from lorac_runtime.session import FinetuneConfig, finetune

EPOCHS, BATCH, RATE = 4, 8, 0.01  # 20 of 25 images train: 12 steps, the last of each epoch with 4 images
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Artifacts of smooth networks (no ReLU to flip, so that float32 runs agree), their pages, and local images."""
    engine, folder = onnxruntime_web(root), tmp_path_factory.mktemp("web")
    np.savez(folder / "local.npz", **noisy_images(25, SPEC.shape, len(NAMES)))
    smooth = network(activation=nn.Softplus())
    smooth[4] = nn.Softplus()
    export(folder / "whole", smooth)
    export(folder / "rear", smooth, method="blocks", lora=LoraConfig(blocks=("7",)))
    for name, webgpu in (("whole", True), ("rear", False)):
        write_site(folder / name, folder / f"{name}-site", to=("onnx", "tflite"), webgpu=webgpu, engine=engine)
    return folder


@pytest.fixture
def opened(browser: Any, home: Path) -> Iterator[Opened]:
    """A function that opens a page in a window of its own; what the window says and asks for is in ``heard``."""
    with contextlib.ExitStack() as stack:

        def open_page(site: str = "whole-site", headers: dict[str, str] | None = None, **window: Any) -> Any:
            address = stack.enter_context(served(home / site, headers))
            size = {"width": window.pop("width", 1200), "height": 800}
            context = stack.enter_context(browser.new_context(viewport=size, **window))
            page = context.new_page()
            page.address, page.heard = address, []
            page.on("console", lambda message: page.heard.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: page.heard.append(f"error: {error}"))
            context.on("request", lambda request: page.heard.append(request.url))
            page.goto(address)
            page.wait_for_selector("#images:not([hidden]), #problem:not([hidden])")
            return page

        yield open_page


def trained(page: Any, home: Path, **settings: object) -> Any:
    """Give the page the local images, train, and wait for the result or a problem."""
    page.set_input_files("#npz", home / "local.npz")
    page.wait_for_selector("#image-notes .good")
    for name, value in {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, **settings}.items():
        if name == "device":
            page.select_option("#set-device", str(value))
        else:
            page.fill(f"#set-{name}", str(value))
    page.click("#train")
    page.wait_for_selector("#result:not([hidden]), #training-notes .problem", timeout=60_000)
    return page


def saved(page: Any, name: str, folder: Path) -> Path:
    """A file that the page offers."""
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {name}").click()
    assert download.value.suggested_filename == name
    download.value.save_as(folder / name)
    return folder / name


def distance(one: Path, other: Path) -> float:
    """Norm of the difference of two adapters, relative to the norm."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    difference = sum(float(np.sum((a[n].astype(float) - b[n]) ** 2)) for n in b)
    return float(np.sqrt(difference / sum(float(np.sum(b[n].astype(float) ** 2)) for n in b)))


@pytest.mark.parametrize(("name", "at_once"), [("whole", BATCH), ("whole", 3), ("rear", BATCH)])
def test_the_page_trains_to_the_numbers_of_the_runtime(
    opened: Opened, home: Path, tmp_path: Path, name: str, at_once: int
) -> None:
    page = trained(opened(f"{name}-site"), home, at_once=at_once)
    config = FinetuneConfig(epochs=EPOCHS, batch_size=BATCH, lr=RATE, threads=1, to=("onnx", "tflite"))
    report = finetune(home / name, home / "local.npz", tmp_path / "runtime", config)
    files = {n: saved(page, n, tmp_path) for n in ("adapter.safetensors", "fused.onnx", "fused.tflite")}
    assert len(report.losses) >= 10
    assert distance(files["adapter.safetensors"], tmp_path / "runtime" / "adapter.safetensors") < 1e-5
    assert distance(home / name / "adapter.safetensors", tmp_path / "runtime" / "adapter.safetensors") > 1e-2
    check_adapter(load(home / name), load_adapter(files["adapter.safetensors"]))
    for file in ("fused.onnx", "fused.tflite"):
        ours, its = files[file].read_bytes(), (tmp_path / "runtime" / file).read_bytes()
        assert len(ours) == len(its)
        assert np.mean(np.frombuffer(ours, np.uint8) != np.frombuffer(its, np.uint8)) < 0.3
    figures = page.inner_text("#figures")
    assert f"{100 * report.accuracy_before:.1f} % → {100 * report.accuracy_after:.1f} %" in figures
    assert f"on {report.val_images} held-out images" in figures
    assert f"{len(report.losses)} steps, WebAssembly" in figures


def test_the_fused_file_answers_with_the_adapter(opened: Opened, home: Path, tmp_path: Path) -> None:
    import onnxruntime

    from lorac_runtime.patch import fuse

    page = trained(opened(), home)
    adapter, fused = saved(page, "adapter.safetensors", tmp_path), saved(page, "fused.onnx", tmp_path)
    fuse(home / "whole", tmp_path / "expected.onnx", load_file(adapter))
    images = np.random.default_rng(3).normal(size=(4, *SPEC.shape)).astype(np.float32)
    answers = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": images})[0]
        for path in (fused, tmp_path / "expected.onnx", home / "whole" / "base.onnx")
    ]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    assert np.max(np.abs(answers[0] - answers[2])) > 0.1


def test_no_request_leaves_the_page_and_none_could(opened: Opened, home: Path) -> None:
    page = trained(opened(), home)
    urls = [text for text in page.heard if "://" in text.split(" ")[0]]
    assert len(urls) > 20
    assert all(url.startswith((page.address, f"blob:{page.address}", "data:")) for url in urls)
    assert [text for text in page.heard if text not in urls] == []
    asked = """async (other) => {
      const ask = `fetch('${other}', { mode: 'no-cors' }).then(() => 'sent', (error) => error.name)`;
      const worker = new Worker(URL.createObjectURL(new Blob([`${ask}.then((text) => postMessage(text))`])));
      const said = new Promise((ok) => worker.addEventListener('message', ({ data }) => ok(data)));
      return [await fetch(other, { mode: 'no-cors' }).then(() => 'sent', (error) => error.name), await said];
    }"""
    with served(home) as other:  # a server that is there, of another origin
        assert page.evaluate(asked, other) == ["TypeError", "TypeError"]


def test_where_webgpu_is_missing_the_page_says_so_and_trains_all_the_same(opened: Opened, home: Path) -> None:
    page = trained(opened(), home, device="webgpu")
    said = page.inner_text("#training-notes")
    assert "WebGPU" in said
    assert "Training goes on with the processor" in said
    assert "12 steps, WebAssembly" in page.inner_text("#figures")


def test_pausing_changes_nothing_and_stopping_keeps_the_images(opened: Opened, home: Path, tmp_path: Path) -> None:
    page = opened()
    page.set_input_files("#npz", home / "local.npz")
    for name, value in {"epochs": 400, "batch_size": BATCH, "lr": RATE}.items():
        page.fill(f"#set-{name}", str(value))
    page.click("#train")
    for text in ("of 1200", "Paused", "of 1200 "):
        expect(page.locator("#progress-text")).to_contain_text(text)
        if text != "of 1200 ":
            page.click("#pause")
    page.click("#stop")
    page.wait_for_selector("#training-notes .warning")
    assert "Stopped" in page.inner_text("#training-notes")
    assert "25 images of 4 classes" in page.inner_text("#counts")
    once = saved(trained(page, home, epochs=1), "adapter.safetensors", tmp_path)
    assert once.stat().st_size > 0  # 50 images now: the file was added twice


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("new RangeError('Array buffer allocation failed')", "set “Images at once” to 2 and train again"),
        ("new Error('std::bad_alloc')", "Your images are still here"),
        ("new Error('no kernel for Foo')", "could not train: no kernel for Foo"),
    ],
)
def test_an_engine_that_fails_is_told_and_the_images_stay(opened: Opened, home: Path, error: str, text: str) -> None:
    page = opened()
    failing = (home / "whole-site" / "js" / "engine.js").read_text(encoding="utf-8")
    call = "return await session.run(inputs);"
    assert call in failing
    failing = failing.replace(call, f"if (what === 'train') throw {error}; {call}")
    fail = {"body": failing, "content_type": "text/javascript"}
    page.context.route("**/js/engine.js", lambda route: route.fulfill(**fail), times=1)  # the next worker's is sound
    page.reload()
    page.wait_for_selector("#images:not([hidden])")
    trained(page, home)
    assert text in page.inner_text("#training-notes .problem")
    page.click("#train")  # a new engine
    page.wait_for_selector("#result:not([hidden])")
    assert "25 images of 4 classes" in page.inner_text("#counts")


def test_a_rate_that_diverges_is_named_with_a_lower_one(opened: Opened, home: Path) -> None:
    page = trained(opened(), home, lr=1e30, epochs=2)
    said = page.inner_text("#training-notes .problem")
    assert "diverged at a peak learning rate of 1e+30" in said
    assert "such as 3e+29" in said


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


def test_two_headers_give_threads(opened: Opened, home: Path) -> None:
    assert "one thread" in opened().inner_text("#about")
    page = trained(opened(headers=ISOLATED), home)
    assert "several threads" in page.inner_text("#about")
    assert "12 steps" in page.inner_text("#figures")


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


def test_the_documented_command_writes_a_page(
    home: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = re.findall(r"^```sh\n(.*?)^```$", (root / "docs" / "browser.md").read_text(encoding="utf-8"), re.M | re.S)[
        0
    ]
    line = block.splitlines()[0]
    cache = tmp_path / "lorac-deploy"
    cache.mkdir()
    (cache / engine_files.cache().name).symlink_to(onnxruntime_web(root))
    (tmp_path / "artifact").symlink_to(home / "whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(line)
    assert program == "lorac-deploy"
    assert cli.main(argv) == 0
    assert (tmp_path / "site" / "index.html").is_file()
