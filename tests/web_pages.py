"""What tests of the page need: onnxruntime-web, and a browser window that listens."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_artifacts import NAMES, SPEC, export, network
from torch import nn

from benchmarks.web_browser import served
from lorac_deploy.web import engine_files
from lorac_deploy.web.site import write_site
from lorac_exporters.plan import LoraConfig

Opened = Callable[..., Any]
EPOCHS, BATCH, RATE = 4, 8, 0.01  # 20 of 25 images train: 12 steps, the last of each epoch with 4 images
STATIC = Path(engine_files.__file__).parent / "static"


def onnxruntime_web(root: Path) -> Path:
    """Where `make web-env` put the engine; without it tests are skipped, or fail where it is said to be there."""
    folder = root / ".envs" / "web"
    if not all((folder / name).is_file() for name in engine_files.FILES):
        absent = pytest.fail if os.environ.get("LORAC_NEEDS_WEB") == "1" else pytest.skip
        absent(f"{engine_files.PINNED} is not in {folder}: make web-env")
    return folder


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


def write_sites(folder: Path, root: Path, *names: str) -> Path:
    """Artifacts of smooth networks (no ReLU to flip, so that float32 runs agree), their pages, and local images."""
    engine = onnxruntime_web(root)
    np.savez(folder / "local.npz", **noisy_images(25, SPEC.shape, len(NAMES)))
    smooth = network(activation=nn.Softplus())
    smooth[4] = nn.Softplus()
    methods: dict[str, dict[str, object]] = {
        "whole": {},
        "rear": {"method": "blocks", "lora": LoraConfig(blocks=("7",))},
    }
    for name in names:
        export(folder / name, smooth, **methods[name])
        write_site(folder / name, folder / f"{name}-site", to=("onnx", "tflite"), webgpu=True, engine=engine)
    return folder


def windows(browser: Any, home: Path) -> Iterator[Opened]:
    """A function that opens a page in a window of its own; what the window says and asks for is in ``heard``."""
    with contextlib.ExitStack() as stack:

        def open_page(site: str = "whole-site", headers: dict[str, str] | None = None, **window: Any) -> Any:
            address = stack.enter_context(served(home / site, headers))
            size = {"width": window.pop("width", 1200), "height": 800}
            context = stack.enter_context(browser.new_context(viewport=size, **window))
            page = context.new_page()
            page.address, page.heard = address, []
            page.on("console", lambda message: page.heard.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: page.heard.append(f"error: {error}"))
            context.on("request", lambda request: page.heard.append(request.url))
            page.goto(address)
            page.wait_for_selector("#images:not([hidden]), #problem:not([hidden])")
            return page

        yield open_page


def trained(page: Any, home: Path, **settings: object) -> Any:
    """Give the page the local images, train, and wait for the result or a problem."""
    page.set_input_files("#npz", home / "local.npz")
    page.wait_for_selector("#image-notes .good")
    for name, value in {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, **settings}.items():
        if name == "device":
            page.select_option("#set-device", str(value))
        else:
            page.fill(f"#set-{name}", str(value))
    page.click("#train")
    page.wait_for_selector("#result:not([hidden]), #training-notes .problem", timeout=60_000)
    return page
