"""What all tests share. It also serves tests/runtime, so it imports neither torch nor onnx."""

from __future__ import annotations

import functools
import gc
import os
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
REALDATA = ROOT.parent / "shared" / "data"

# Tiny networks are several times faster on one thread, above all where other work shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if sys.version_info < (3, 12):
    # onnx-ir asks isinstance(..., Protocol) at every turn; Python 3.12 itself remembers a protocol's attributes.
    typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)  # type: ignore[attr-defined]

# Same examples in each run; no deadline, because the machine may be shared.
settings.register_profile("project", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests begin, so that none is left to one worker at the end; data must be there."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not REALDATA.is_dir():
        _skip_realdata(items)


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never what was imported: that took a sixth of the time of work on graphs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(30_000, 20, 20)


def _skip_realdata(items: list[pytest.Item]) -> None:
    """Skip tests on real data, by name, where that folder is absent."""
    for item in items:
        if item.get_closest_marker("realdata"):
            item.add_marker(pytest.mark.skip(reason=f"no real data in {REALDATA}"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data and weights; for tests marked `realdata`."""
    return REALDATA
