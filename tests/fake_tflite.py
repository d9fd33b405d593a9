"""A base.tflite of nothing but bytes, for the artifacts of tests/runtime: tensors and their scales at known places.

Convolutions lie output channels first and input channels last, conv1 the other way round as a depthwise weight would,
fc with its columns as (3, 2), channels of a feature map last, and with one scale for all of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lorac_runtime import manifest as mf

Small = Any
INPUT_SCALES = {"conv1": 0.0078125, "conv2": 0.031, "conv3": 0.2, "fc": 0.05}
ORDERS = {"conv1.weight": (1, 2, 3, 0), "conv2.weight": (0, 2, 3, 1), "conv3.weight": (0, 2, 3, 1)}
DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "int32": "<i4"}
SIZES = {"float32": 4, "float16": 2, "int8": 1, "int32": 4}


def dtype_of(name: str, weights: str) -> str:
    """How a file with such weights stores a tensor."""
    if name.startswith("norm") or weights == "float32":
        return "float32"
    if weights == "fp16":
        return "float16" if name.endswith("weight") else "float32"
    return "int8" if name.endswith("weight") else "int32"


def partner_of(name: str) -> str:
    """Bias of a weight, weight of a bias."""
    layer, part = name.split(".")
    return f"{layer}.{'bias' if part == 'weight' else 'weight'}"


def with_tflite(artifact: Small, weights: str) -> Small:
    """The artifact with a base.tflite and its patch table: for each tensor its scales, noise, its numbers, noise."""
    rng = np.random.default_rng(3)
    content, patches = bytearray(rng.bytes(9)), []
    for name, value in artifact.base.items():
        dtype, quantized = dtype_of(name, weights), None
        if dtype.startswith("int"):
            nbytes = 4 if name.startswith("fc") else 4 * len(value)
            scales = mf.ByteRange(len(content), nbytes)
            content += rng.bytes(nbytes) + rng.bytes(3)
            quantized = mf.Quantized(0, scales, partner_of(name), INPUT_SCALES[name.split(".")[0]])
        view = (5, 2, 3) if name == "fc.weight" else None
        order = (0, 2, 1) if name == "fc.weight" else ORDERS.get(name)
        nbytes = SIZES[dtype] * value.size
        patches.append(mf.Patch(name, mf.BASE_TFLITE, len(content), nbytes, dtype, value.shape, order, view, quantized))
        content += rng.bytes(nbytes) + rng.bytes(5)
    path = artifact.folder / mf.BASE_TFLITE
    path.write_bytes(content)
    entry = mf.TfliteEntry(weights, "float32", "float32", (1, 6, 5, 3), (1, 5))
    files = artifact.manifest.files | {mf.BASE_TFLITE: mf.FileEntry(mf.sha256(path), len(content))}
    return artifact.with_manifest(files=files, patches=(*artifact.manifest.patches, *patches), tflite=entry)


def tflite_patch(artifact: Small, tensor: str) -> mf.Patch:
    """Its row of the patch table for base.tflite."""
    return next(p for p in artifact.manifest.patches if (p.file, p.tensor) == (mf.BASE_TFLITE, tensor))


def stored(content: bytes, patch: mf.Patch) -> np.ndarray:
    """The numbers in the file, in the tensor's own shape."""
    view = patch.view or patch.shape
    order = patch.permute or tuple(range(len(view)))
    flat = np.frombuffer(content[patch.offset :][: patch.nbytes], DTYPES[patch.dtype])
    by_place = flat.reshape([view[axis] for axis in order])
    value = np.empty(view, flat.dtype)
    for place in np.ndindex(by_place.shape):
        index = [0] * len(view)
        for position, axis in enumerate(order):
            index[axis] = place[position]
        value[tuple(index)] = by_place[place]
    return value.reshape(patch.shape)


def scales_in(content: bytes, patch: mf.Patch) -> np.ndarray:
    """The scales in the file."""
    assert patch.quantization is not None
    where = patch.quantization.scales
    return np.frombuffer(content[where.offset :][: where.nbytes], "<f4")


def edited(artifact: Small, tensor: str, **changes: Any) -> Small:
    """The artifact with other fields in a tensor's row for base.tflite; those of Quantized too. Not on disk."""
    patch = tflite_patch(artifact, tensor)
    inner = {f.name for f in dataclasses.fields(mf.Quantized)} & changes.keys()
    if inner:
        assert patch.quantization is not None
        quantized = dataclasses.replace(patch.quantization, **{name: changes.pop(name) for name in inner})
        changes["quantization"] = quantized
    other = dataclasses.replace(patch, **changes)
    patches = tuple(other if p is patch else p for p in artifact.manifest.patches)
    return dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, patches=patches))
