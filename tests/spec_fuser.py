"""A fuser of training artifacts, written from sections 6 and 9 of docs/specification.md alone, with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from spec_reader import Artifact, Json, RefusedError, Tensors, kernel

F = np.float32


def numbers(content: bytes, p: Json) -> np.ndarray:
    """The float32 tensor that a patch entry of base.onnx locates."""
    axes = p.get("view") or p["shape"]
    order = p.get("permute") or list(range(len(axes)))
    stored = np.frombuffer(content[p["offset"] : p["offset"] + p["nbytes"]], "<f4")
    return stored.reshape([axes[i] for i in order]).transpose(np.argsort(order)).reshape(p["shape"])


def change(a: Json, lora_a: np.ndarray, lora_b: np.ndarray, alpha: float) -> np.ndarray:
    """Section 6: what an adapter adds, in the weight's shape."""
    o, c, k_h, k_w = kernel(a["weight_shape"])
    n = a.get("pairs", 1)
    rows = [b @ f for b, f in zip(np.split(lora_b, n), np.split(lora_a, n), strict=True)]
    p = np.concatenate(rows)
    if a["layout"] == "spatial":
        p = p.reshape(o, k_h, c, k_w).transpose(0, 2, 1, 3)
    return F(alpha / a["r"]) * p.reshape(a["weight_shape"])


def by_row(weight: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Each output channel times its factor, rounded to float32."""
    rows = len(weight) // len(g)
    return (weight * np.repeat(g, rows).reshape(-1, *[1] * (weight.ndim - 1))).astype(F)


class Norm:
    """A batch normalisation that changed."""

    def __init__(self, bn: Json, norms: Tensors, state: Tensors) -> None:
        now = {
            k: state.get(bn[k], norms[bn[k]]).astype(float) for k in ("weight", "bias", "running_mean", "running_var")
        }
        self.bn, self.norms = bn, norms
        self.old = norms[bn["weight"]] / np.sqrt(norms[bn["running_var"]].astype(float) + bn["eps"])
        self.g = now["weight"] / np.sqrt(now["running_var"] + bn["eps"])
        self.mean, self.beta = now["running_mean"], now["bias"]

    def bias(self, value: np.ndarray | float) -> np.ndarray:
        return ((value - self.mean) * self.g + self.beta).astype(F)

    def refolded(self, base: Tensors) -> Tensors:
        first, second = self.bn["folded_into"]
        if self.bn["affine"]:
            factor, summand = self.g.astype(F), self.bias(0.0)
            return {first: factor.reshape(base[first].shape), second: summand.reshape(base[second].shape)}
        name = self.bn["name"]
        given = self.norms.get(f"{name}.conv_row_index", np.zeros(0, np.int64))
        kept = np.ones(len(self.old), bool)
        kept[given] = False
        if not self.old[kept].all():
            raise RefusedError(f"{name} cannot be unfolded")
        ratio = np.divide(self.g, self.old, out=np.zeros_like(self.old), where=kept)
        weight = by_row(base[first], ratio.astype(F))
        if given.size:
            weight[given] = by_row(self.norms[f"{name}.conv_rows"], self.g[given])
        return {first: weight, second: self.bias(self.norms[f"{name}.conv_bias"].astype(float))}


def changed_norms(m: Json, norms: Tensors, state: Tensors) -> list[Norm]:
    """Step 1: which batch normalisations count."""
    trained = {t["name"] for t in m["trainables"]}
    if m["bn_policy"] == "frozen":
        if m["coordinates"] == "folded":
            return []
        reach = trained | {x["weight"] for x in [*m["adapters"], *m["partials"]]}
        counted = [bn for bn in m["batchnorms"] if reach & {bn["weight"], bn["bias"], *bn["folded_into"]}]
    else:
        counted = m["batchnorms"]
    own = {n: v for n, v in state.items() if m["coordinates"] == "unfolded" or n not in trained}
    return [Norm(bn, norms, own) for bn in counted]


def final_values(m: Json, base: Tensors, norms: Tensors, state: Tensors) -> Tensors:
    """Section 9, "Final values"."""
    found = changed_norms(m, norms, state)
    values: Tensors = {}
    for norm in found:
        values |= norm.refolded(base)
    live = found if m["coordinates"] == "unfolded" else []
    by_weight = {norm.bn["folded_into"][0]: norm for norm in live}
    by_bias = {norm.bn["folded_into"][1]: norm for norm in live}
    for t in m["trainables"]:
        name, value = t["name"], state[t["name"]]
        if t["role"] not in ("weight", "bias") and (m["coordinates"] == "unfolded" or name not in base):
            continue
        if name in by_weight:
            value = by_row(value, by_weight[name].g)
        elif name in by_bias:
            value = by_bias[name].bias(value.astype(float))
        values[name] = value
    for a in m["adapters"]:
        lora_b, alpha = state[a["lora_b"]], a["alpha"]
        if a["weight"] in by_weight:
            lora_b = by_row(lora_b, by_weight[a["weight"]].g)
        if a["lora_alpha"] is not None:
            alpha = float(state[a["lora_alpha"]][0])
        start = values.get(a["weight"], base[a["weight"]])
        values[a["weight"]] = start + change(a, state[a["lora_a"]], lora_b, alpha)
    for p in m["partials"]:
        part = state[p["tensor"]]
        if p["weight"] in by_weight:
            part = by_row(part, by_weight[p["weight"]].g)
        whole = np.array(values.get(p["weight"], base[p["weight"]]))
        whole[:, p["channels"]] = part
        values[p["weight"]] = whole
    return values


def half(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = value.astype(np.float16)
    largest = np.copysign(np.finfo(np.float16).max, value).astype(np.float16)
    return np.where(np.isinf(stored), largest, stored)


def peak(value: np.ndarray, axis: int | None) -> np.ndarray:
    if axis is None:
        return np.abs(value).max().reshape(1).astype(float)
    return np.abs(np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)).max(1).astype(float)


def quantized(p: Json, w: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(integers of the weight, its scales, scales of the bias)."""
    q = p["quantization"]
    axis = q["axis"] if q["scales"]["nbytes"] == 4 * p["shape"][q["axis"]] else None
    s = np.maximum(peak(w, axis) / 127, 2.0**-28 / q["input_scale"])
    if b is not None:
        s = np.maximum(s, peak(b.reshape(-1), None if axis is None else 0) / (q["input_scale"] * 2.0**30))
    s = s.astype(F)
    along = s.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    return np.clip(np.rint(w / along), -127, 127).astype("i1"), s, (s.astype(float) * q["input_scale"]).astype(F)


def put(content: bytearray, at: int, value: np.ndarray, dtype: str) -> None:
    data = np.ascontiguousarray(value).astype(dtype).tobytes()
    content[at : at + len(data)] = data


def fused(artifact: Artifact, state: Tensors, file: str) -> bytes:
    """The whole file."""
    m = artifact.manifest
    original = (artifact.folder / "base.onnx").read_bytes()
    base = {p["tensor"]: numbers(original, p) for p in m["patches"] if p["file"] == "base.onnx"}
    values = final_values(m, base, artifact.norms, state)
    entries = {p["tensor"]: p for p in m["patches"] if p["file"] == file}
    if values.keys() - entries.keys():
        raise RefusedError("a value without a patch entry")
    for name in list(values):
        partner = (entries[name].get("quantization") or {}).get("partner")
        values |= {partner: base[partner]} if partner is not None and partner not in values else {}
    content = bytearray((artifact.folder / file).read_bytes())
    for name, value in values.items():
        write(content, entries, name, value, values)
    return bytes(content)


def write(content: bytearray, entries: dict[str, Json], name: str, value: np.ndarray, values: dict[str, Any]) -> None:
    p = entries[name]
    axes = p.get("view") or p["shape"]

    def stored(numbers: np.ndarray) -> np.ndarray:
        return numbers.reshape(axes).transpose(p.get("permute") or range(len(axes)))

    if p["dtype"] == "float32":
        put(content, p["offset"], stored(value), "<f4")
    elif p["dtype"] == "float16":
        put(content, p["offset"], stored(half(value)), "<f2")
    elif p["dtype"] == "int8":
        partner = p["quantization"]["partner"]
        integers, s, t = quantized(p, value, None if partner is None else values[partner])
        put(content, p["offset"], stored(integers), "i1")
        put(content, p["quantization"]["scales"]["offset"], s, "<f4")
        if partner is not None:
            other, limits = entries[partner], np.iinfo(np.int32)
            put(content, other["quantization"]["scales"]["offset"], t, "<f4")
            steps = np.clip(np.rint(values[partner].reshape(-1).astype(float) / t), limits.min, limits.max)
            put(content, other["offset"], steps, "<i4")
