"""The report in a real browser: it opens in silence, its plots are drawn, its tables sort, and it fits a phone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_results as rr
from browsers import CONTRAST, launched

from benchmarks import report

LATENCY = "#section-latency details.table >> nth=0"
TARGET = "#section-finetune details.table:has(h3:text-is('Time to target'))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of this file."""
    yield from launched()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section and a run to compare with, in which one verdict was another."""
    now = rr.results()
    before = [_moved(row) for row in now.rows[2:]]
    previous = dataclasses.replace(now, rows=before, started="2026-11-20T09:00:00+00:00")
    return report.write(now, tmp_path_factory.mktemp("report"), previous)


def _moved(row: Any) -> Any:
    flips = (row.model, row.format, row.variant, row.quantity) == ("resnet50", "onnx", "fused", "latency")
    ratio = None if row.ratio is None else 1.01 * row.ratio
    return dataclasses.replace(row, ratio=ratio, verdict="different" if flips else row.verdict)


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    """A function that opens the page in a window of its own."""
    contexts = []

    def open_page(width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.goto(written.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_it_opens_without_errors_and_asks_for_nothing_else(browser: Any, written: Path) -> None:
    heard: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(written.as_uri())
        page.wait_for_load_state("networkidle")
        assert page.title() == "Benchmark report, 2026-11-22 10:00 UTC"
    assert heard == [written.as_uri()]


def test_every_plot_is_drawn_and_readable_on_a_phone(opened: Opened) -> None:
    page = opened(360)
    plots = page.locator("svg.plot").evaluate_all(
        """(all) => all.map((svg) => ({
          box: svg.getBoundingClientRect().toJSON(), paths: svg.querySelectorAll("path").length,
          label: svg.getAttribute("aria-label"), title: svg.querySelector("title").textContent,
          text: Math.min(...[...svg.querySelectorAll("text")].map((t) => t.getBoundingClientRect().height)),
          outside: [...svg.querySelectorAll("text")].filter((t) => {
            const [inner, outer] = [t.getBoundingClientRect(), svg.getBoundingClientRect()];
            return inner.left < outer.left - 1 || inner.right > outer.right + 1;
          }).map((t) => t.textContent),
        }))"""
    )
    assert len(plots) == 8 + 8 + 1 + 4 + 2 + 2  # distributions, ratios, cost, growth, memory, footprint
    for plot in plots:
        assert min(plot["box"]["width"], plot["box"]["height"]) > 100, plot
        assert plot["paths"] > 5, plot
        assert plot["title"] == plot["label"] != "", plot
        assert plot["text"] > 9, plot
        assert plot["outside"] == [], plot
    assert page.locator(".left-out").count() == 0


def test_ids_are_unique_and_references_within_plots_lead_somewhere(opened: Opened) -> None:
    broken = opened().evaluate(
        """() => {
          const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
          const wanted = [...document.querySelectorAll("*")].flatMap((element) => [...element.attributes])
            .flatMap((a) => [...a.value.matchAll(/^#([^)]+)|url\\(#([^)]+)\\)/g)].map((m) => m[1] || m[2]));
          return { twice: ids.filter((id, k) => ids.indexOf(id) !== k), lost: wanted.filter((id) => !ids.includes(id)),
                   some: wanted.length };
        }"""
    )
    assert (broken["twice"], broken["lost"]) == ([], [])
    assert broken["some"] > 100


def column(table: Any, title: str) -> list[str]:
    """The texts of a column from top to bottom."""
    titles = [text.strip() for text in table.locator("th").all_inner_texts()]
    place = titles.index(title) + 1
    cells: list[str] = table.locator(f"tbody > tr:first-child > td:nth-child({place})").all_inner_texts()
    return [text.strip() for text in cells]


def states(table: Any) -> dict[str, str]:
    """Of every column that is sorted, which way."""
    found = table.locator("th").evaluate_all("(all) => all.map((th) => [th.innerText.trim(), th.ariaSort])")
    return {title: state for title, state in found if state != "none"}


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace(",", "")) for text in texts if text not in ("", "none")]


def test_a_click_sorts_numbers_and_a_second_click_turns_them_round(opened: Opened) -> None:
    table = opened().locator(LATENCY)
    before = numbers(column(table, "Median, ms"))
    table.get_by_role("button", name="Median, ms").click()
    assert states(table) == {"Median, ms": "ascending"}
    assert numbers(column(table, "Median, ms")) == sorted(before) != before
    table.get_by_role("button", name="Median, ms").click()
    assert states(table) == {"Median, ms": "descending"}
    assert numbers(column(table, "Median, ms")) == sorted(before, reverse=True)
    table.get_by_role("button", name="Ratio").click()
    assert states(table) == {"Ratio": "ascending"}


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_keys_sort_and_missing_figures_stay_last(opened: Opened, key: str) -> None:
    page = opened()
    table = page.locator(TARGET)
    table.locator("summary").click()
    for state in ("ascending", "descending"):
        table.get_by_role("button", name="Median, s").focus()
        page.keyboard.press(key)
        texts = column(table, "Median, s")
        known = numbers(texts)
        assert states(table) == {"Median, s": state}
        assert known == sorted(known, reverse=state == "descending")
        assert texts[len(known) :] == ["none"] * 3


def test_words_are_sorted_as_words(opened: Opened) -> None:
    table = opened().locator(LATENCY)
    table.get_by_role("button", name="Variant").click()
    texts = column(table, "Variant")
    assert [text.splitlines()[0] for text in texts] == sorted(text.splitlines()[0] for text in texts)


def test_a_row_shows_and_hides_its_details_and_takes_them_along(opened: Opened) -> None:
    page = opened(390)
    table = page.locator(LATENCY)
    name = table.get_by_role("button", name="fused", exact=True).first.get_attribute("aria-controls")
    button, details = page.locator(f"button[aria-controls={name}]"), page.locator(f"#{name}")
    assert not details.is_visible()
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    text = details.inner_text()
    for term in ("Minimum", "90th percentile", "Interval of the ratio", "drop-in: 12 checks", "image size 224"):
        assert term in text
    table.get_by_role("button", name="Median, ms").click()
    assert details.evaluate("(row) => row.previousElementSibling.querySelector('button').ariaExpanded") == "true"
    button.press("Enter")
    assert not details.is_visible()


def test_without_scripts_all_details_are_there(opened: Opened) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(f"{LATENCY} >> tr.details").first.is_visible()


def test_a_phone_needs_no_sideways_scrolling_but_within_tables(opened: Opened) -> None:
    page = opened(360)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    page.evaluate("document.querySelectorAll('tr.details').forEach((row) => { row.hidden = false })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator(f"{LATENCY} >> .scroll").first
    assert box.evaluate("(box) => box.scrollWidth - box.clientWidth") > 100
    widest = page.locator(".details dl").evaluate_all("(all) => Math.max(...all.map((d) => d.clientWidth))")
    assert widest <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(opened: Opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 60) == (scheme == "dark")
    assert page.evaluate(CONTRAST, "body") > 10
    for selector in ("main p", ".quiet", "a", "th", "td", "dt", "dd", "code", ".verdict", ".notice *", "figcaption"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    assert page.evaluate(CONTRAST, "svg.plot text") >= 4.5
    assert page.evaluate(CONTRAST, ".swatch path") >= 3


def test_the_previous_run_is_compared_flips_first(opened: Opened) -> None:
    kept = rr.every_row()[2:]
    page = opened()
    text = page.locator("#changes").inner_text()
    assert f"Rows in both runs: {len(kept)}, new: 2, no longer there: 0." in text
    flip = "latency: resnet50, onnx, onnxruntime, fused, batch 1, float32, 1 thread, image size 224: different → same"
    assert text.index("1 verdict flipped between same and different") < text.index(flip)
    ratios = sum(row.ratio is not None for row in kept)
    assert f"0 of {ratios} ratios moved by more than 3 %; the largest move is 1.0 %." in text
    page.locator("#changes details.table summary").click()
    assert column(page.locator("#changes details.table"), "Verdict")[0] == "different → same"


def test_text_of_a_results_file_stays_text(opened: Opened) -> None:
    page = opened()
    assert page.title() != "taken"
    assert page.locator("script").count() == 1
    assert rr.HOSTILE in page.locator("main > section").last.inner_text()
