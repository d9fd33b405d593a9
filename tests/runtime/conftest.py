"""A small artifact of nothing but bytes: enough for everything on a device that does not run a graph.

The base file is noise with tensors at odd offsets, as in a protobuf. The network whose numbers it holds::

    conv1 - bn1 - conv2 - bn2 - conv3 (3 groups) - norm - fc

bn1 and bn2 were folded into conv1 and conv2; norm became Mul + Add. conv1 and fc train in full, conv2 and
conv3 have adapters. fc.weight lies transposed in the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorac_runtime import manifest as mf

Arrays = dict[str, np.ndarray]
EPS = 1e-3
R, ALPHA = 2, 5.0
SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "conv1.bias": (4,),
    "conv2.weight": (6, 4, 3, 2),
    "conv2.bias": (6,),
    "conv3.weight": (6, 2, 1, 3),
    "conv3.bias": (6,),
    "norm.weight": (1, 6, 1, 1),
    "norm.bias": (1, 6, 1, 1),
    "fc.weight": (5, 6),
    "fc.bias": (5,),
}
ADAPTED = {"conv2": (4, 1), "conv3": (6, 3)}  # layer: (rank, groups)
NORMS = {"bn1": ("conv1", 4), "bn2": ("conv2", 6), "norm": ("norm", 6)}
FIELDS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Small:
    """An artifact and its numbers: ``base`` as in the file, ``unfolded`` as before folding, ``norms`` of BN,
    ``state`` a trained state that differs from the base everywhere, in the artifact's coordinates.
    """

    folder: Path
    manifest: mf.Manifest
    base: Arrays
    unfolded: Arrays
    norms: Arrays
    state: Arrays

    def entry(self, tensor: str) -> mf.Patch:
        """Its row of the patch table."""
        return next(p for p in self.manifest.patches if p.tensor == tensor)

    def with_manifest(self, **changes: Any) -> Small:
        """The same artifact with another manifest, on disk too."""
        manifest = dataclasses.replace(self.manifest, **changes)
        (self.folder / mf.FILE_NAME).write_text(manifest.to_json())
        return dataclasses.replace(self, manifest=manifest)


def floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of size one."""
    return rng.normal(size=shape).astype(np.float32)


def unfolded_numbers(rng: np.random.Generator, zero_channels: bool) -> tuple[Arrays, Arrays]:
    """Weights before folding, and the tensors of every batch normalisation."""
    weights = {name: floats(rng, shape) for name, shape in SHAPES.items() if not name.startswith("norm")}
    norms: Arrays = {}
    for bn, (_, channels) in NORMS.items():
        norms[f"{bn}.weight"] = rng.uniform(0.5, 2.0, channels).astype(np.float32)
        norms[f"{bn}.bias"] = floats(rng, (channels,))
        norms[f"{bn}.running_mean"] = floats(rng, (channels,))
        norms[f"{bn}.running_var"] = rng.uniform(0.5, 2.0, channels).astype(np.float32)
    if zero_channels:
        norms["bn2.weight"][[1, 4]] = 0.0, 1e-30
    return weights, norms


def folded_numbers(weights: Arrays, norms: Arrays) -> Arrays:
    """What the base file holds, by the formula of batch normalisation in float64."""
    base = {name: value.astype(np.float64) for name, value in weights.items()}
    for bn, (layer, channels) in NORMS.items():
        gamma, beta, mean, var = (norms[f"{bn}.{field}"].astype(np.float64) for field in FIELDS)
        sigma = np.sqrt(var + EPS)
        if layer == bn:
            base[f"{bn}.weight"] = (gamma / sigma).reshape(1, channels, 1, 1)
            base[f"{bn}.bias"] = (beta - gamma * mean / sigma).reshape(1, channels, 1, 1)
        else:
            base[f"{layer}.weight"] = base[f"{layer}.weight"] * (gamma / sigma)[:, None, None, None]
            base[f"{layer}.bias"] = gamma * (base[f"{layer}.bias"] - mean) / sigma + beta
    return {name: value.astype(np.float32) for name, value in base.items()}


def blob(base: Arrays, rng: np.random.Generator) -> tuple[bytes, tuple[mf.Patch, ...]]:
    """A file with every tensor somewhere in it, and where."""
    content = bytearray(rng.bytes(13))
    patches = []
    for name, value in base.items():
        order = (1, 0) if name == "fc.weight" else None
        patches.append(mf.Patch(name, mf.BASE, len(content), value.nbytes, "float32", value.shape, order))
        content += np.ascontiguousarray(value.transpose(order) if order else value).tobytes() + rng.bytes(7)
    return bytes(content), tuple(patches)


def adapters(layout: str, learnable_alpha: bool) -> tuple[mf.Adapter, ...]:
    """The manifest's adapters."""
    names = ("weight", "lora_a", "lora_b")
    return tuple(
        mf.Adapter(
            layer,
            *(f"{layer}.{name}" for name in names),
            weight_shape=SHAPES[f"{layer}.weight"],
            groups=groups,
            r=R,
            rank=rank,
            alpha=ALPHA,
            layout=layout,
            lora_alpha=f"{layer}.lora_alpha" if learnable_alpha else None,
        )
        for layer, (rank, groups) in ADAPTED.items()
    )


def trainables(also: tuple[tuple[str, str], ...], learnable_alpha: bool, policy: str) -> tuple[mf.Trainable, ...]:
    """conv1, fc and the factors of adapters, and what else is asked for as (name, role)."""
    found = [mf.Trainable("conv1.weight", SHAPES["conv1.weight"], "weight")]
    for layer, (rank, _) in ADAPTED.items():
        c_out, c_in, k_h, k_w = SHAPES[f"{layer}.weight"]
        found.append(mf.Trainable(f"{layer}.lora_a", (rank, c_in * k_w), "lora_a"))
        found.append(mf.Trainable(f"{layer}.lora_b", (c_out * k_h, rank), "lora_b"))
        found += [mf.Trainable(f"{layer}.lora_alpha", (1,), "alpha")] if learnable_alpha else []
    found += [mf.Trainable(name, SHAPES[name], name.split(".")[1]) for name in ("fc.weight", "fc.bias")]
    for name, role in also:
        live = role.startswith("bn_") and policy == "batch"
        shape = (NORMS[name.split(".")[0]][1],) if live else SHAPES[name]
        found.append(mf.Trainable(name, shape, role))
    return tuple(found)


def batchnorms() -> tuple[mf.BatchNorm, ...]:
    """The manifest's batch normalisations."""
    return tuple(
        mf.BatchNorm(
            bn,
            *(f"{bn}.{field}" for field in FIELDS),
            eps=EPS,
            momentum=0.1,
            positions=9,
            folded_into=(f"{layer}.weight", f"{layer}.bias"),
            affine=layer == bn,
        )
        for bn, (layer, _) in NORMS.items()
    )


def entry(path: Path) -> mf.FileEntry:
    """Its hash and size, not computed by the code under test."""
    data = path.read_bytes()
    return mf.FileEntry(hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Small]:
    """Makes an artifact. ``also``: further trainables as (name, role); ``zero_channels``: two g of bn2 are zero."""

    def make(
        policy: str = "frozen",
        layout: str = "spatial",
        also: tuple[tuple[str, str], ...] = (),
        learnable_alpha: bool = False,
        zero_channels: bool = False,
    ) -> Small:
        rng = np.random.default_rng(7)
        folder = tmp_path / "artifact"
        folder.mkdir(exist_ok=True)
        unfolded, norms = unfolded_numbers(rng, zero_channels)
        base = folded_numbers(unfolded, norms)
        content, patches = blob(base, rng)
        (folder / mf.BASE).write_bytes(content)
        extra = {f"bn{n}.conv_bias": unfolded[f"conv{n}.bias"] for n in (1, 2)}
        if zero_channels:
            extra["bn2.conv_rows"] = unfolded["conv2.weight"][[1, 4]]
            extra["bn2.conv_row_index"] = np.array([1, 4])
        save_file(norms | extra, folder / mf.BATCHNORM)
        trained = trainables(also, learnable_alpha, policy)
        state = {t.name: floats(rng, t.shape) for t in trained}
        if policy != "frozen":
            for bn, (_, channels) in NORMS.items():
                state[f"{bn}.running_mean"] = floats(rng, (channels,))
                state[f"{bn}.running_var"] = rng.uniform(0.5, 2.0, channels).astype(np.float32)
        manifest = mf.Manifest(
            schema_version=mf.SCHEMA_VERSION,
            model="small",
            method="lora-c",
            bn_policy=policy,
            coordinates="unfolded" if policy == "batch" else "folded",
            input=mf.InputSpec("input", (3, 6, 5), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
            output=mf.OutputSpec("logits", 5),
            class_names=("ant", "bee", "cat", "dog", "eel"),
            adapters=adapters(layout, learnable_alpha),
            trainables=trained,
            batchnorms=batchnorms(),
            training=mf.TrainingDefaults(),
            files={name: entry(folder / name) for name in (mf.BASE, mf.BATCHNORM)},
            patches=patches,
            tolerances={"logits": 1e-4},
            engines={},
            model_parameters=sum(math.prod(shape) for shape in SHAPES.values()),
            versions={"lorac-deploy": "0"},
        )
        (folder / mf.FILE_NAME).write_text(manifest.to_json())
        return Small(folder, manifest, base, unfolded, norms, state)

    return make
