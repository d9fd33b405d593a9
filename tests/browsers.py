"""A real browser for tests of pages: Chromium, if the system has one; playwright fetches none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("background-networking", "component-update", "sync")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
CONTRAST = """
(selector) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = {};
  const read = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const channels = (colour) => (known[colour] ??= read(colour));
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    throw new Error("no ground below " + selector);
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const [a, b] = [light(channels(element.closest("svg") ? style.fill : style.color)), light(ground(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  return Math.min(...[...document.querySelectorAll(selector)].map(contrast));
}
"""


def launched(*flags: str) -> Iterator[Any]:
    """A Chromium, for a fixture to yield; without one tests are skipped, or fail where it is said to be there."""
    absent = pytest.fail if os.environ.get("LORAC_NEEDS_BROWSER") == "1" else pytest.skip
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        absent(f"none of the browsers {', '.join(BROWSERS)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("the Python package playwright is not installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=[*OPTIONS, *flags])
        yield chromium
        chromium.close()
