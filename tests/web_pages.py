"""What tests of the page need: onnxruntime-web, a server for static files, and a browser window that listens."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorac_deploy.web import engine_files

STATIC = Path(engine_files.__file__).parent / "static"
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def onnxruntime_web(root: Path) -> Path:
    """Where `make web-env` put the engine; without it tests are skipped, or fail where it is said to be there."""
    folder = root / ".envs" / "web"
    if not all((folder / name).is_file() for name in engine_files.FILES):
        absent = pytest.fail if os.environ.get("LORAC_NEEDS_WEB") == "1" else pytest.skip
        absent(f"{engine_files.PINNED} is not in {folder}: make web-env")
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, headers: dict[str, str], **kwargs: Any) -> None:
        self._more = headers
        super().__init__(*args, **kwargs)

    def end_headers(self) -> None:
        for name, value in self._more.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a server for the files of ``folder``, as `python3 -m http.server` is one."""
    handler = functools.partial(_Quiet, directory=str(folder), headers=headers or {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def noisy_images(count: int, shape: Sequence[int], classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Images uint8 (count, H, W, C) whose brightness tells the class, as arrays of a local.npz."""
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    values = rng.normal(60, 30, (count, height, width, channels)) + 45 * labels[:, None, None, None]
    return {"images": np.clip(values, 0, 255).astype(np.uint8), "labels": labels}


def encoded(data: bytes) -> str:
    """Bytes on their way into a page, for `atob`."""
    return base64.b64encode(data).decode()
