"""The command line of a bundle: as that of ``ort_finetune.py``, with the artifact that lies in the same file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from lorac_runtime import cli
from lorac_runtime.unpacking import unpacked


def main(argv: Sequence[str] | None = None) -> int:
    """`lorac_runtime.cli.main` of the bundle that this module was loaded from."""
    return cli.main(argv, bundled=functools.partial(unpacked, Path(__file__).parent.parent))
