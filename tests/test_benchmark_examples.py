"""Examples in docstrings of the benchmarks hold; pytest collects those of the packages only."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
MODULES = sorted(p.stem for p in FOLDER.glob("*.py") if ">>> " in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"), verbose=False)
    assert found.attempted > 0
    assert found.failed == 0
