"""A reader of training artifacts, written from docs/specification.md alone: nothing of this project is imported.

Manifests stay JSON objects here. `read` gives everything of an artifact or the list of what must be refused.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Json = dict[str, Any]
Tensors = dict[str, np.ndarray]
ITEM = {"float32": 4, "float16": 2, "int8": 1, "int32": 4}
STORED = {"F32": "<f4", "I64": "<i8"}


class RefusedError(Exception):
    """What the specification says a reader must refuse."""


class Artifact(NamedTuple):
    """A folder that was read and found sound."""

    folder: Path
    manifest: Json
    state: Tensors
    norms: Tensors


def safetensors(content: bytes) -> tuple[Tensors, dict[str, str]]:
    """(tensors, metadata) of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata, data = header.pop("__metadata__", {}), content[8 + size :]
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = np.frombuffer(data[start:end], STORED[entry["dtype"]]).reshape(entry["shape"])
    return found, metadata


def read(folder: Path) -> Artifact:
    """Sections 2, 4, 5, 7 and 8."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest.get("schema_version") != 1:
        raise RefusedError("another version")
    problems = [*names(manifest), *files(folder, manifest), *doubles(manifest), *shapes(manifest), *table(manifest)]
    if problems:
        raise RefusedError("\n".join(problems))
    state = adapter(manifest, (folder / "adapter.safetensors").read_bytes())
    norms: Tensors = {}
    if manifest["batchnorms"]:
        norms, _ = safetensors((folder / "batchnorm.safetensors").read_bytes())
    return Artifact(folder, manifest, state, norms)


def names(m: Json) -> Iterator[str]:
    """Rules 3 and 8 of section 5, as far as names go."""
    for name in m["files"]:
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            yield f"the file name {name!r}"
    if "base.onnx" not in m["files"]:
        yield "no base.onnx"
    for engine in m["engines"].values():
        yield from (f"{name} is of an engine and not in files" for name in engine["files"] if name not in m["files"])
    wanted = {"batch": "unfolded", "recalibrate": "folded"}.get(m["bn_policy"], m["coordinates"])
    if m["coordinates"] != wanted:
        yield f"{m['bn_policy']} needs {wanted}"
    if len(m["class_names"]) != m["output"]["classes"]:
        yield "class names"


def files(folder: Path, m: Json) -> Iterator[str]:
    """Rule 4; the folder may be read as a whole, because artifacts of tests are small."""
    for name, entry in m["files"].items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            yield f"{name} is missing"
            continue
        content = path.read_bytes()
        if len(content) != entry["nbytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            yield f"{name} was altered"


def doubles(m: Json) -> Iterator[str]:
    """Rule 5."""
    described = {
        "trainables": [t["name"] for t in m["trainables"]],
        "adapters": [a[k] for a in m["adapters"] for k in ("lora_a", "lora_b", "lora_alpha") if a.get(k) is not None],
        "partials": [p["tensor"] for p in m.get("partials", [])],
        "features": [f["name"] for f in m.get("features", [])],
        "patches": [p["file"] + "/" + p["tensor"] for p in m["patches"]],
    }
    for where, found in described.items():
        yield from (f"{where}: {name} twice" for name, n in collections.Counter(found).items() if n > 1)


def kernel(shape: list[int]) -> tuple[int, int, int, int]:
    """(o, c, k_h, k_w) of section 6."""
    o, c, *k = shape
    return (o, c, *([1] * (2 - len(k))), *k)  # type: ignore[return-value]


def factors(a: Json) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of lora_a and lora_b."""
    o, c, k_h, k_w = kernel(a["weight_shape"])
    return (a.get("pairs", 1) * a["rank"], c * k_w), (o * k_h, a["rank"])


def shapes(m: Json) -> Iterator[str]:
    """Rule 6."""
    trained = {t["name"]: tuple(t["shape"]) for t in m["trainables"]}
    for a in m["adapters"]:
        for name, shape in zip((a["lora_a"], a["lora_b"]), factors(a), strict=True):
            if trained.get(name, shape) != shape:
                yield f"{name} has another shape"
        if a["lora_b"] not in trained or (a.get("lora_alpha") or a["lora_b"]) not in trained:
            yield f"{a['lora_b']} does not train"
        if a["weight_shape"][0] % a.get("pairs", 1):
            yield f"{a['layer']}: pairs"
    for p in m.get("partials", []):
        o, c, *k = p["weight_shape"]
        if sorted(set(p["channels"])) != p["channels"] or not 0 <= p["channels"][0] <= p["channels"][-1] < c:
            yield f"{p['layer']}: channels"
        if trained.get(p["tensor"]) != (o, len(p["channels"]), *k):
            yield f"{p['tensor']} has another shape"


def stretches(p: Json) -> list[tuple[int, int]]:
    """(offset, nbytes) of all that an entry owns."""
    q = p.get("quantization")
    return [(p["offset"], p["nbytes"])] + ([(q["scales"]["offset"], q["scales"]["nbytes"])] if q else [])


def table(m: Json) -> Iterator[str]:
    """Rule 7."""
    entries = {(p["file"], p["tensor"]): p for p in m["patches"]}
    reach: dict[str, int] = {}
    owned = sorted((p["file"], at, size, p["tensor"]) for p in m["patches"] for at, size in stretches(p))
    for file, at, size, name in owned:
        if file not in m["files"] or at < reach.get(file, 0) or at + size > m["files"][file]["nbytes"]:
            yield f"{name}: bytes {at} to {at + size} of {file}"
        reach[file] = at + size
    for p in m["patches"]:
        axes = p.get("view") or p["shape"]
        fits = p["nbytes"] == ITEM[p["dtype"]] * math.prod(p["shape"]) == ITEM[p["dtype"]] * math.prod(axes)
        if not fits or sorted(p.get("permute") or range(len(axes))) != list(range(len(axes))):
            yield f"{p['tensor']}: form"
        if p["file"] == "base.onnx" and (p["dtype"] != "float32" or p.get("view") or p.get("quantization")):
            yield f"{p['tensor']}: base.onnx holds float32"
        if entries.get(("base.onnx", p["tensor"]), {}).get("shape") != p["shape"]:
            yield f"{p['tensor']}: no numbers in base.onnx"
        yield from pairs(p, entries)


def pairs(p: Json, entries: dict[tuple[str, str], Json]) -> Iterator[str]:
    """The part of rule 7 on quantization."""
    q = p.get("quantization")
    if (q is not None) != (p["dtype"] in ("int8", "int32")):
        yield f"{p['tensor']}: quantization"
    if q is None or q["partner"] is None:
        return
    other = entries.get((p["file"], q["partner"]), {}).get("quantization") or {}
    if (other.get("partner"), other.get("input_scale")) != (p["tensor"], q["input_scale"]):
        yield f"{p['tensor']} and {q['partner']} are not partners"


def tensors_of(m: Json) -> dict[str, tuple[int, ...]]:
    """What an adapter file must hold but for statistics, with shapes."""
    found = {t["name"]: tuple(t["shape"]) for t in m["trainables"]}
    for a in m["adapters"]:
        found |= dict(zip((a["lora_a"], a["lora_b"]), factors(a), strict=True))
    return found


def adapter(m: Json, content: bytes) -> Tensors:
    """Section 7, for a file in the coordinates of the manifest."""
    tensors, metadata = safetensors(content)
    needed = tensors_of(m)
    statistics = [bn[k] for bn in m["batchnorms"] for k in ("running_mean", "running_var")]
    may = [bn[k] for bn in m["batchnorms"] for k in ("weight", "bias")]
    if m["bn_policy"] == "frozen":
        statistics, may = [], []
    wrong = [n for n in (*needed, *statistics) if n not in tensors]
    wrong += [n for n in tensors if n not in needed and n not in statistics and n not in may]
    wrong += [n for n, s in needed.items() if n in tensors and tensors[n].shape != s]
    wrong += [n for n, v in tensors.items() if v.dtype != np.float32 or not np.isfinite(v).all()]
    fixed = {"format": "lorac-adapter", "schema": "1", "coordinates": m["coordinates"]}
    fixed |= {k: m[k] for k in ("model", "method", "bn_policy")}
    wrong += [k for k, v in fixed.items() if metadata.get(k) != v]
    if metadata.get("base_sha256", "") not in ("", m["files"]["base.onnx"]["sha256"]):
        wrong.append("base_sha256")
    if wrong:
        raise RefusedError(", ".join(wrong))
    return tensors
