"""The page's modules, each against what it imitates: numpy, safetensors, hashlib, and the device's own runtime."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import launched
from web_pages import STATIC, encoded

from benchmarks.web_browser import served
from lorac_runtime.adapter import save_adapter
from lorac_runtime.data import preprocess, stratified_split
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.schedule import one_cycle
from lorac_runtime.stored import as_half

SPEC = InputSpec("input", (3, 4, 5), 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BYTES = "const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));"
TEXT = "const textOf = (bytes) => btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(''));"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A window that can import the page's modules."""
    with served(STATIC) as address:
        for browser in launched():
            window = browser.new_page()
            window.goto(address + "style.css")
            yield window


def js(page: Any, module: str, body: str, argument: object = None) -> Any:
    """What ``body``, with ``m`` the module and ``given`` the argument, returns."""
    load = f"const m = await import(new URL('/js/{module}.js', location.href).href);"
    return page.evaluate(f"async (given) => {{ {BYTES} {TEXT} {load} {body} }}", argument)


def bytes_from(text: str) -> bytes:
    return base64.b64decode(text)


def test_orders_are_those_of_numpy_for_many_seeds(page: Any) -> None:
    rng = np.random.default_rng(1)
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, *rng.integers(0, 2**40, 40).tolist()]
    cases = [
        (seed, epoch, int(n)) for seed in seeds for epoch, n in ((None, rng.integers(0, 9)), (3, rng.integers(900)))
    ]
    cases += [(7, 0, 4097), (7, 1, 65537)]
    body = "return given.map(([seed, e, n]) => new m.Generator(e === null ? seed : [seed, e]).permutation(n));"
    for (seed, epoch, count), found in zip(cases, js(page, "random", body, cases), strict=True):
        generator = np.random.default_rng(seed if epoch is None else [seed, epoch])
        assert found == generator.permutation(count).tolist(), (seed, epoch, count)


def test_the_same_samples_are_held_out(page: Any) -> None:
    rng = np.random.default_rng(2)
    cases = []
    for seed in range(30):
        labels = rng.integers(0, rng.integers(1, 8), rng.integers(20, 200)).tolist()
        cases.append((labels, float(rng.choice([0.0, 0.1, 0.2, 0.37, 0.5])), seed))
    found = js(page, "data", "return given.map(([labels, share, seed]) => m.split(labels, share, seed));", cases)
    for (labels, share, seed), parts in zip(cases, found, strict=True):
        train, held = stratified_split(np.array(labels), share, seed)
        assert (parts["train"], parts["held"]) == (train.tolist(), held.tolist()), (share, seed)
    with pytest.raises(DataError):
        stratified_split(np.array([0, 1]), 0.2, 0)
    assert "too few to hold out 20 %" in js(
        page, "data", "try { m.split([0, 1], 0.2, 0) } catch (error) { return error.message }"
    )


@pytest.mark.parametrize("in_graph", [False, True])
def test_pixels_become_the_same_numbers(page: Any, in_graph: bool) -> None:
    spec = dataclasses.replace(SPEC, in_graph=in_graph)
    images = np.random.default_rng(3).integers(0, 256, (6, 4, 5, 3), np.uint8)
    body = "const found = m.preprocess(bytesOf(given.pixels), given.batch, given.input);"
    body += "return [textOf(new Uint8Array(found.data.buffer)), found.type, found.shape];"
    given = {"pixels": encoded(images.tobytes()), "batch": [5, 0, 0, 3], "input": dataclasses.asdict(spec)}
    text, kind, shape = js(page, "data", body, given)
    expected = preprocess(images[[5, 0, 0, 3]], spec)
    assert (kind, tuple(shape)) == (expected.dtype.name, expected.shape)
    assert bytes_from(text) == expected.tobytes()


def test_learning_rates_are_the_same(page: Any) -> None:
    cases = [
        (s, n, 0.01, w) for n, w in ((1, 0.3), (5, 0.5), (10, 0.25), (10, 0.0), (9, 1.0), (40, 0.3)) for s in range(n)
    ]
    found = js(page, "training", "return given.map((c) => m.oneCycle(...c));", cases)
    expected = [one_cycle(s, n, peak=peak, warmup=warmup) for s, n, peak, warmup in cases]
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_adapter_files_have_the_bytes_that_the_runtime_writes(page: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in (("b.lora_b", (3, 2)), ("a", (5,)), ("B", ()))}
    metadata = {"model": "n\u00e4t \U0001f600", "method": 'lo"ra', "producer": "x"}
    save_adapter(tmp_path / "a.safetensors", tensors, metadata)
    expected = (tmp_path / "a.safetensors").read_bytes()
    body = "const { tensors, metadata } = m.read(bytesOf(given), 'a'); return textOf(m.write(tensors, metadata));"
    assert bytes_from(js(page, "safetensors", body, encoded(expected))) == expected
    cut = "try { m.read(bytesOf(given), 'a.safetensors') } catch (error) { return error.message }"
    assert "not a whole safetensors file" in js(page, "safetensors", cut, encoded(expected[:-4]))


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 1000])
def test_hashes_without_the_browsers_help_are_right(page: Any, length: int) -> None:
    data = bytes(i * 7 % 251 for i in range(length))
    both = "return [m.sha256Here(bytesOf(given)), await m.sha256(bytesOf(given))];"
    assert js(page, "sha256", both, encoded(data)) == [hashlib.sha256(data).hexdigest()] * 2


def test_half_precision_rounds_as_numpy_does(page: Any) -> None:
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 20_000, np.uint32)
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([bits.view(np.float32), ties, -ties, halves])
    values = values[np.isfinite(values)]
    body = "const losses = { overflowed: 0 }; const found = m.halves(new Float32Array(bytesOf(given).buffer), losses);"
    body += "return [textOf(new Uint8Array(found.buffer)), losses.overflowed];"
    text, overflowed = js(page, "stored", body, encoded(values.tobytes()))
    expected, lost = as_half(values)
    assert overflowed == lost > 0
    assert bytes_from(text) == expected.tobytes()


def test_rounding_to_whole_numbers_takes_ties_to_even(page: Any) -> None:
    values = [*np.arange(-6, 6.25, 0.25), 126.5, 127.5, -0.5, 2**31 + 0.5, 1e-9]
    assert js(page, "stored", "return given.map(m.rint);", values) == np.rint(values).tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("first", [False, True], ids=["channels-last", "channels-first"])
def test_npz_files_are_read_and_written_as_numpy_does(page: Any, save: Any, first: bool) -> None:
    images = np.random.default_rng(6).integers(0, 256, (7, 4, 5, 3), np.uint8)
    labels = np.arange(7, dtype=np.int32) % 3
    stream = io.BytesIO()
    save(stream, labels=labels, images=images.transpose(0, 3, 1, 2) if first else images)
    body = "const file = new File([bytesOf(given.file)], 'local.npz');"
    body += "const { pixels, labels } = await m.readNpz(file, given.input, 3);"
    body += "const again = new Uint8Array(await m.writeNpz(pixels, labels, given.input).arrayBuffer());"
    body += "return [textOf(pixels), labels, textOf(again)];"
    given = {"file": encoded(stream.getvalue()), "input": dataclasses.asdict(SPEC)}
    pixels, numbers, again = js(page, "npz", body, given)
    assert (bytes_from(pixels), numbers) == (images.tobytes(), labels.tolist())
    with np.load(io.BytesIO(bytes_from(again))) as file:
        np.testing.assert_array_equal(file["images"], images)
        np.testing.assert_array_equal(file["labels"], labels)
        assert (file["images"].dtype, file["labels"].dtype) == (np.uint8, np.int64)


def spoiled(kind: str) -> bytes:
    images, labels = np.zeros((4, 4, 5, 3), np.uint8), np.array([0, 1, 2, 0])
    stream = io.BytesIO()
    contents: dict[str, dict[str, np.ndarray]] = {
        "float": {"images": images.astype(np.float32), "labels": labels},
        "shape": {"images": images[:, :3], "labels": labels},
        "label": {"images": images, "labels": labels + 1},
        "count": {"images": images, "labels": labels[:3]},
        "lacks": {"pictures": images, "labels": labels},
    }
    np.savez(stream, **contents.get(kind, {"images": images, "labels": labels}))
    data = stream.getvalue()
    return {"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}.get(kind, data)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("float", "whole numbers"),
        ("shape", "images have shape (4, 3, 5, 3), expected (N, 4, 5, 3)"),
        ("label", "labels must be 0 to 2, there is 3"),
        ("count", "4 images but labels of shape (3)"),
        ("lacks", "holds no array images"),
        ("cut", "is cut off"),
        ("text", "no .npz file"),
        ("empty", "no .npz file"),
    ],
)
def test_a_bad_npz_file_is_refused_in_words(page: Any, kind: str, text: str) -> None:
    body = "const file = new File([bytesOf(given.file)], 'x.npz');"
    body += "try { await m.readNpz(file, given.input, 3); return 'taken' } catch (error) { return error.message }"
    said = js(page, "npz", body, {"file": encoded(spoiled(kind)), "input": dataclasses.asdict(SPEC)})
    assert said.startswith("x.npz: ")
    assert text in said


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_gives_pillows_pixels(page: Any, channels: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(8).integers(0, 256, (4, 5, 3), np.uint8)
    given = {"file": encoded(png(pixels)), "input": {"shape": [channels, 4, 5]}}
    body = "const found = await m.decoded(new File([bytesOf(given.file)], 'a.png'), given.input);"
    text, resized = js(page, "images", body + "return [textOf(found.pixels), found.resized];", given)
    expected = np.asarray(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"))
    assert (bytes_from(text), resized) == (expected.tobytes(), False)


def test_another_size_is_scaled_until_it_covers_and_the_middle_is_kept(page: Any) -> None:
    wide = np.zeros((8, 40, 3), np.uint8)
    wide[:, 12:28] = (200, 100, 50)  # the middle ten columns are kept; smoothing looks a little beyond
    given = {"file": encoded(png(wide)), "input": {"shape": [3, 4, 5]}}
    body = "const found = await m.decoded(new File([bytesOf(given.file)], 'a.png'), given.input);"
    text, resized = js(page, "images", body + "return [textOf(found.pixels), found.resized];", given)
    found = np.frombuffer(bytes_from(text), np.uint8).reshape(4, 5, 3)
    assert resized
    np.testing.assert_allclose(found.astype(int), np.broadcast_to([200, 100, 50], (4, 5, 3)), atol=2)
