"""Files fused by the page against those of the device's runtime, from the same artifact and the same adapter."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import launched
from test_tflite_fusing import CLASSES, IMAGES, SPEC, graph, trained
from web_pages import STATIC

from benchmarks.web_browser import served
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import save_adapter
from lorac_runtime.patch import fuse

LORA = LoraConfig(rank=2, biases="all", small_layers="adapter")
CONFIGS = {
    "spatial": ArtifactConfig(lora=LORA),
    "paper": ArtifactConfig(lora=dataclasses.replace(LORA, layout="paper", learnable_alpha=True), tflite="fp16"),
    "kernel": ArtifactConfig(lora=LORA, method="lora-kernel", tflite="int8"),
    "channels": ArtifactConfig(lora=LoraConfig(share=0.5, biases="all"), method="paca", tflite="int8"),
    "full": ArtifactConfig(method="full", tflite="fp16"),
}
FUSE = """async ([folder, file]) => {
  const { fused } = await import('/js/fuse.js');
  const { read } = await import('/js/safetensors.js');
  const bytes = async (name) => new Uint8Array(await (await fetch(`/${folder}/${name}`)).arrayBuffer());
  const manifest = JSON.parse(new TextDecoder().decode(await bytes('manifest.json')));
  const { tensors } = read(await bytes('state.safetensors'), 'state');
  const made = fused(manifest, await bytes('base.onnx'), await bytes(file), file, tensors);
  const text = btoa(Array.from(made.bytes, (b) => String.fromCharCode(b)).join(''));
  return [text, made.overflowed, made.saturated];
}"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules, and a folder for each artifact."""
    folder = tmp_path_factory.mktemp("fusing")
    (folder / "js").symlink_to(STATIC / "js")
    (folder / "blank.html").write_text("<title>blank</title>")
    return folder


@pytest.fixture(scope="module")
def page(home: Path) -> Iterator[Any]:
    with served(home) as address:
        for browser in launched():
            window = browser.new_page()
            window.goto(address + "blank.html")
            yield window


def exported(folder: Path, config: ArtifactConfig) -> dict[str, np.ndarray]:
    """Write an artifact; returns something else for every tensor that can change, which it holds as state too."""
    calibration = IMAGES if config.tflite == "int8" else None
    names = tuple("abcdefghij"[:CLASSES])
    write_artifact(
        graph("layers"), folder, name="net", spec=SPEC, class_names=names, config=config, calibration=calibration
    )
    state = trained(folder, 1)
    save_adapter(folder / "state.safetensors", state, {})
    return state


def numbers(content: bytes, patch: mf.Patch) -> np.ndarray:
    kinds = {"float32": "<f4", "float16": "<f2", "int8": "i1", "int32": "<i4"}
    return np.frombuffer(content[patch.offset : patch.offset + patch.nbytes], kinds[patch.dtype]).astype(np.float64)


STEPS = {"float32": 2**-23, "float16": 2**-10, "int8": 0, "int32": 0}  # a last digit, relative; integers may be 1 off


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_files_are_those_of_the_runtime(page: Any, home: Path, name: str) -> None:
    folder = home / name
    state = exported(folder, CONFIGS[name])
    manifest = mf.load(folder)
    for file in (mf.BASE, mf.BASE_TFLITE):
        report = fuse(folder, home / f"{name}-{file}", state, base=file)
        text, overflowed, saturated = page.evaluate(FUSE, [name, file])
        found, expected = base64.b64decode(text), (home / f"{name}-{file}").read_bytes()
        assert (len(found), overflowed, tuple(saturated)) == (len(expected), report.overflowed, report.saturated)
        assert found != (folder / file).read_bytes()
        if found != expected:  # sums of another matrix product: the last digit of some numbers
            _assert_last_digits(found, expected, [p for p in manifest.patches if p.file == file])


def _assert_last_digits(found: bytes, expected: bytes, patches: list[mf.Patch]) -> None:
    outside = np.ones(len(found), bool)
    for patch in patches:
        one, other = numbers(found, patch), numbers(expected, patch)
        within = STEPS[patch.dtype] * np.max(np.abs(other)) or 1
        assert np.max(np.abs(one - other)) <= within, patch.tensor
        assert np.mean(one != other) < 0.2, patch.tensor
        for stretch in [patch.content, *([patch.quantization.scales] if patch.quantization else [])]:
            outside[stretch.offset : stretch.end] = False
    assert np.array_equal(np.frombuffer(found, np.uint8)[outside], np.frombuffer(expected, np.uint8)[outside])


def test_a_patch_table_without_an_entry_is_refused_by_name(page: Any, home: Path) -> None:
    folder = home / "lacking"
    exported(folder, CONFIGS["spatial"])
    manifest = mf.load(folder)
    less = dataclasses.replace(manifest, patches=tuple(p for p in manifest.patches if p.tensor != "0.weight"))
    (folder / "manifest.json").write_text(less.to_json(), encoding="utf-8")
    with pytest.raises(Exception, match=r"no entry for 0\.weight"):
        page.evaluate(FUSE, ["lacking", mf.BASE])
