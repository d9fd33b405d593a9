"""A store of domains, and the files that it should make. It serves tests/runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_tflite import with_tflite

from lorac_runtime import domains as ds
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.patch import batchnorm_tensors, fuse

Small = Any
Maker = Callable[..., Small]
BOTH = ("onnx", "tflite")


def metadata(manifest: mf.Manifest, **changes: str) -> dict[str, str]:
    known = {"model": manifest.model, "method": manifest.method, "bn_policy": manifest.bn_policy}
    known |= {"layout": manifest.adapters[0].layout, "r": "2", "rank_mode": "rk", "alpha": "5"}
    return known | {"coordinates": manifest.coordinates, "base_sha256": manifest.files[mf.BASE].sha256, **changes}


def adapter_of(artifact: Small, seed: int, path: Path, **changes: str) -> Path:
    """An adapter file that fits: other numbers for each seed."""
    rng = np.random.default_rng(seed)
    moved = {n: (v + rng.normal(scale=0.1, size=v.shape)).astype(np.float32) for n, v in artifact.state.items()}
    moved = {n: np.abs(v) if n.endswith("running_var") else v for n, v in moved.items()}
    save_adapter(path, moved, metadata(artifact.manifest, **changes))
    return path


def expected(artifact: Small, adapter: Path, base: str = mf.BASE) -> bytes:
    """The fused file, made without any store."""
    file, norms = load_adapter(adapter), batchnorm_tensors(artifact.folder, artifact.manifest)
    target = adapter.with_suffix(".expected")
    fuse(artifact.folder, target, to_manifest_coordinates(artifact.manifest, norms, file), base=base)
    return target.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@dataclasses.dataclass(frozen=True)
class Shop:
    """A store with the domains day and night, and their adapter files."""

    artifact: Small
    store: ds.Store
    adapters: dict[str, Path]
    out: Path

    def fused(self, name: str, base: str = mf.BASE) -> bytes:
        if name == ds.BASE_DOMAIN:
            return bytes((self.artifact.folder / base).read_bytes())
        return expected(self.artifact, self.adapters[name], base)


def stocked(small: Maker, tmp_path: Path) -> Shop:
    artifact = with_tflite(small(), "float32")
    store = ds.create(tmp_path / "store", artifact.folder)
    adapters = {name: adapter_of(artifact, n, tmp_path / f"{name}.st") for n, name in enumerate(("day", "night"))}
    for name, path in adapters.items():
        ds.add(store, name, path)
    return Shop(artifact, store, adapters, tmp_path / "app")
