"""Trials and studies fine-tune many times: what one run would warn of is a finding there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_runtime() -> Iterator[None]:
    """The device's runtime logs errors only, while the block runs."""
    logger = logging.getLogger("lorac_runtime")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
