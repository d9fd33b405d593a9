"""The page that trains, driven in a Chromium: what it gives back, and how long its steps take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from lorac_runtime.fleet.payload import Tensors

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
PATIENCE = 1_000_000  # milliseconds
WATCH = r"""() => {
  window.seen = [];
  const text = document.getElementById("progress-text");
  new MutationObserver(() => {
    const found = text.textContent.match(/, ([\d.]+) ms per step/);
    if (found) seen.push(Number(found[1]));
  }).observe(text, { childList: true });
}"""


@dataclasses.dataclass(frozen=True)
class Visit:
    """A training on the page: the adapter, and the milliseconds of each step."""

    adapter: Tensors
    milliseconds: tuple[float, ...]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Raises SystemExit if there is none."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise SystemExit(f"none of {', '.join(PROGRAMS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(OPTIONS))
        yield browser
        browser.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, more: Mapping[str, str], **kwargs: Any) -> None:
        self._more = more
        super().__init__(*args, **kwargs)

    def end_headers(self) -> None:
        for name, value in self._more.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path, more: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server for the files of ``folder``, as `python3 -m http.server` is one; ``more``: headers."""
    handler = functools.partial(_Quiet, directory=str(folder), more=more or {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def visit(browser: Any, site: Path, images: Path, settings: Mapping[str, object], *, threads: bool = False) -> Visit:
    """Train on the page of ``site`` with the ``.npz`` file ``images``; ``threads``: as many as the page takes.

    Raises ValueError with the page's own words if it trained nothing.
    """
    with served(site, ISOLATED if threads else {}) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#images:not([hidden])")
        page.set_input_files("#npz", images)
        page.wait_for_selector("#image-notes .good")
        for name, value in settings.items():
            page.fill(f"#set-{name}", str(value))
        page.evaluate(WATCH)
        page.click("#train")
        page.wait_for_selector("#result:not([hidden]), #training-notes .problem", timeout=PATIENCE)
        if page.locator("#training-notes .problem").count():
            raise ValueError(page.inner_text("#training-notes"))
        with page.expect_download() as download:
            page.get_by_role("button", name="Download adapter.safetensors").click()
        return Visit(load(download.value.path().read_bytes()), tuple(page.evaluate("seen")))


def distance(one: Tensors, other: Tensors) -> float:
    """Norm of the difference of two adapters, relative to the norm of ``other``.

    >>> distance({"a": np.array([3.0, 4.0])}, {"a": np.array([0.0, 4.0])})
    0.75
    """
    apart = sum(float(np.sum((one[n].astype(float) - other[n]) ** 2)) for n in other)
    return float(np.sqrt(apart / sum(float(np.sum(other[n].astype(float) ** 2)) for n in other)))
