"""The site of documentation: built without a warning, and complete in itself."""

from __future__ import annotations

import html.parser
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.application import Sphinx

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
WRITTEN = ("artifact.html", "specification.html", "tutorial.html", "limits.html", "results.html", "commands.html")


class Page(html.parser.HTMLParser):
    """What a page loads, where it leads, and what can be led to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given["id"]} if "id" in given else set()
        if tag in LOADED and LOADED[tag] in given and given.get("rel") not in ("index", "search", "next", "prev"):
            self.loads.append(given[LOADED[tag]])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of MyST about Sphinx
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        made = Sphinx(
            root / "docs", root / "docs", out / "html", out / "trees", "html", status=None, warningiserror=True
        )
        made.build()
    assert made.statuscode == 0
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_docs_is_there(root: Path, site: Path) -> None:
    sources = {path.relative_to(root / "docs").with_suffix(".html") for path in (root / "docs").rglob("*.md")}
    assert {path for path in sources if not (site / path).is_file()} == set()
    assert {Path(name) for name in WRITTEN} <= sources


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loads = {(path, address) for path, page in pages.items() for address in page.loads}
    assert len(loads) > 100
    outside = {address for _, address in loads if urlsplit(address).scheme or address.startswith("//")}
    assert {address for address in outside if not address.startswith("data:")} == set()
    assert [str(p) for p, a in loads if a not in outside and not (p.parent / unquote(urlsplit(a).path)).is_file()] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(
        f"{start}{address}" in text
        for text in styles
        for start in ("url(", 'url("', "@import ")
        for address in ("http", "//")
    )


def test_links_within_the_site_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    lost, followed = [], 0
    for path, page in pages.items():
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            followed += 1
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (parts.fragment and target in pages and unquote(parts.fragment) not in anchors):
                lost.append(f"{path.relative_to(site)}: {address}")
    assert followed > 1000
    assert lost == []


def test_the_reference_has_every_public_name(root: Path, pages: dict[Path, Page], site: Path) -> None:
    import lorac_deploy
    import lorac_runtime
    from lorac_exporters import tflite

    for package, name in (
        (lorac_deploy, "lorac_deploy"),
        (lorac_runtime, "lorac_runtime"),
        (tflite, "lorac_exporters"),
    ):
        anchors = pages[site / "reference" / f"{name}.html"].anchors
        assert {f"{package.__name__}.{public}" for public in package.__all__} - anchors == set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; without one the test is skipped, or fails where it is said to be there."""
    absent = pytest.fail if os.environ.get("LORAC_NEEDS_BROWSER") == "1" else pytest.skip
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        absent("no chromium on this system")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as player:
        started = player.chromium.launch(executable_path=program, args=OPTIONS)
        yield started
        started.close()


@pytest.mark.parametrize("name", ["index.html", "specification.html"])
def test_a_browser_asks_for_nothing_but_files_and_nothing_overflows_a_phone(
    name: str, site: Path, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800})
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / name).as_uri())
    page.wait_for_load_state("load")
    assert errors == []
    assert len(asked) > 3
    assert {urlsplit(address).scheme for address in asked} <= {"file", "data"}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
