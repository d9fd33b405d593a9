"""The page end to end in Chromium: the runtime's numbers, nothing sent anywhere, and engines that fail."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import launched
from safetensors.numpy import load_file
from small_artifacts import SPEC
from web_pages import BATCH, EPOCHS, RATE, Opened, onnxruntime_web, trained, windows, write_sites

from benchmarks.web_browser import ISOLATED, served
from lorac_deploy import cli
from lorac_deploy.web import engine_files
from lorac_runtime.adapter import check_adapter, load_adapter
from lorac_runtime.manifest import load
from lorac_runtime.session import FinetuneConfig, finetune


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return write_sites(tmp_path_factory.mktemp("web"), root, "whole", "rear")


@pytest.fixture
def opened(browser: Any, home: Path) -> Iterator[Opened]:
    yield from windows(browser, home)


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
    from playwright.sync_api import expect

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


def test_two_headers_give_threads(opened: Opened, home: Path) -> None:
    assert "one thread" in opened().inner_text("#about")
    page = trained(opened(headers=ISOLATED), home)
    assert "several threads" in page.inner_text("#about")
    assert "12 steps" in page.inner_text("#figures")


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
