"""Helpers for tests of the device's command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_network import W

from lorac_runtime import cli

Run = Callable[..., tuple[int, str, str]]


def arrays(count: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"images": rng.integers(0, 256, (count, W, W, 3), np.uint8), "labels": np.arange(count) % 3}


def runner(artifact: Path, data: Path, folder: Path, *, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command in this process and returns (status, stdout, stderr).

    It checks that no file of the artifact was altered.
    """

    def call(*options: object, artifact: Path = artifact, out: Path = folder / "out") -> tuple[int, str, str]:
        before = {p.name: p.read_bytes() for p in artifact.iterdir()} if artifact.is_dir() else {}
        arguments = ["--data", data, "--out", out, "--epochs", 2, *options]
        try:
            status = cli.main([str(artifact), *map(str, arguments)])
        except SystemExit as usage:
            status = int(str(usage.code))
        after = {p.name: p.read_bytes() for p in artifact.iterdir()} if artifact.is_dir() else {}
        assert after == before
        return status, *capsys.readouterr()

    return call
