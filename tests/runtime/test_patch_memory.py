"""How much memory fusing needs: blocks of the model, not the model."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tflite import partner_of

from lorac_runtime import manifest as mf
from lorac_runtime.patch import fuse

Small = Any
Maker = Callable[..., Small]


def big_artifact(artifact: Small, count: int) -> Small:
    """Only convolutions of 512 channels with adapters, 9.4 MB each, stored as int8 and in base.onnx."""
    rng, onnx, tflite = np.random.default_rng(0), bytearray(b"odd"), bytearray(b"file")
    patches, adapters, trainables, state = [], [], [], {}
    for i in range(count):
        layer, shape = f"conv{i}", (512, 512, 3, 3)
        for part, size in (("weight", shape), ("bias", (512,))):
            value = rng.standard_normal(size, np.float32)
            name, order = f"{layer}.{part}", (0, 2, 3, 1) if part == "weight" else None
            patches.append(mf.Patch(name, mf.BASE, len(onnx), value.nbytes, "float32", size))
            onnx += value.tobytes()
            scales = mf.ByteRange(len(tflite), 2048)
            tflite += bytes(2048)
            quantized = mf.Quantized(0, scales, partner_of(name), 0.1)
            kind, nbytes = ("int8", value.size) if part == "weight" else ("int32", 2048)
            patches.append(mf.Patch(name, mf.BASE_TFLITE, len(tflite), nbytes, kind, size, order, None, quantized))
            tflite += bytes(nbytes)
        names = [f"{layer}.{x}" for x in ("weight", "lora_a", "lora_b")]
        adapters.append(mf.Adapter(layer, *names, shape, 1, 4, 12, 8.0, "spatial"))
        for name, factor in zip(names[1:], ((12, 1536), (1536, 12)), strict=True):
            trainables.append(mf.Trainable(name, factor, name[-6:]))
            state[name] = rng.standard_normal(factor, np.float32)
    (artifact.folder / mf.BASE).write_bytes(onnx)
    (artifact.folder / mf.BASE_TFLITE).write_bytes(tflite)
    names = (mf.BASE, mf.BASE_TFLITE)
    files = {n: mf.FileEntry(mf.sha256(artifact.folder / n), (artifact.folder / n).stat().st_size) for n in names}
    made = artifact.with_manifest(
        files=files,
        patches=tuple(patches),
        adapters=tuple(adapters),
        trainables=tuple(trainables),
        batchnorms=(),
        tflite=mf.TfliteEntry("int8", "float32", "float32", (1, 6, 5, 3), (1, 5)),
    )
    return dataclasses.replace(made, state=state)


@pytest.mark.parametrize("base", [mf.BASE, mf.BASE_TFLITE])
def test_fusing_needs_memory_for_blocks_not_for_the_model(small: Maker, base: str) -> None:
    artifact = big_artifact(small(), 3)
    target: Path = artifact.folder.parent / "fused"
    fuse(artifact.folder, target, artifact.state, base=base)  # imports, and caches of numpy
    tracemalloc.start()
    report = fuse(artifact.folder, target, artifact.state, base=base)
    _, peak = tracemalloc.get_traced_memory()  # numpy's arrays are counted, mapped files are not
    tracemalloc.stop()
    assert report.bytes_patched > (28_000_000 if base == mf.BASE else 7_000_000)
    assert peak < 6_000_000
