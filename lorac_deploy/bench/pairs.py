"""A user's own files as contests: base and fused in each format, what feeds them, and the controls beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from lorac_deploy.bench import controls
from lorac_deploy.bench.contest import Entry
from lorac_exporters import tflite
from lorac_exporters.checks import DropinReport
from lorac_exporters.dropin import Format, file_format, read_model
from lorac_exporters.graph_tools import save
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.references import adapted_state, random_inputs
from lorac_exporters.tflite.reading import read_network, weights_of
from lorac_exporters.tflite_config import TfliteConfig
from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, ConversionError

FORMATS: tuple[Format, ...] = ("onnx", "tflite")
BASE, FUSED = "base", "fused"
UNMERGED, INPUTS, BRANCH = "unmerged", "adapters as inputs", "adapter branch"
SLOWER = (INPUTS, BRANCH)  # controls that must come out slower
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base file and a fused file of one format; ``folder`` is the artifact's, if they come from one."""

    format: Format
    base: Path
    fused: Path
    folder: Path | None

    @property
    def manifest(self) -> mf.Manifest | None:
        """The artifact's manifest."""
        return None if self.folder is None else mf.load(self.folder)

    def structure(self) -> DropinReport:
        """What `verify` says of the two."""
        return verify(self.base, self.fused, artifact=self.folder)


def find_pairs(base: Path, fused: Path) -> list[Pair]:
    """The pairs of an artifact's folder and a folder of fused files, or of two files.

    Raises ArtifactError if there is none, or the files are not what they claim to be.
    """
    if base.is_file() and fused.is_file():
        folder = base.parent if (base.parent / mf.FILE_NAME).is_file() else None
        return [_checked(file_format(base), base, fused, folder)]
    for path, what in ((base, "an artifact's folder or a model file"), (fused, "a folder with fused files, or one")):
        if not path.exists():
            raise ArtifactError(f"{path} not found; expected {what}")
    if base.is_file() or fused.is_file():
        raise ArtifactError(f"{base} and {fused}: give two folders (an artifact, fused files) or two model files")
    mf.load(base)
    names = [(kind, base / f"base.{kind}", fused / f"fused.{kind}") for kind in FORMATS]
    found = [_checked(kind, one, other, base) for kind, one, other in names if one.is_file() and other.is_file()]
    if not found:
        raise ArtifactError(
            f"{fused} has no fused.onnx or fused.tflite whose base is in {base}; `lorac-finetune {base} --data ... "
            f"--to onnx,tflite --out {fused}` writes them"
        )
    return found


def _checked(kind: Format, base: Path, fused: Path, folder: Path | None) -> Pair:
    formats = [file_format(path) for path in (base, fused)]
    if formats[0] != formats[1]:
        raise ArtifactError(f"{base} is {formats[0].upper()}, {fused} is {formats[1].upper()}: expected one format")
    return Pair(kind, base, fused, folder)


def feeds(pair: Pair, batch: int) -> Arrays:
    """Random samples for the pair's only input, by its name.

    Raises ArtifactError if the base has several inputs, or does not say how large they are.
    """
    manifest = pair.manifest
    if manifest is not None:
        return {manifest.input.name: random_inputs(manifest.input, batch, seed=0)}
    name, dtype, shape = _tflite_input(pair.base) if pair.format == "tflite" else _onnx_input(pair.base)
    rng, sizes = np.random.default_rng(0), (batch, *shape[1:])
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return {name: rng.integers(limits.min, limits.max + 1, sizes, dtype=dtype)}
    return {name: rng.standard_normal(sizes).astype(dtype)}


def _onnx_input(path: Path) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    graph = read_model(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    found = [value for value in graph.input if value.name not in weights]
    if len(found) != 1:
        raise ArtifactError(f"{path} has {len(found)} inputs ({', '.join(v.name for v in found)}), expected one")
    tensor = found[0].type.tensor_type
    shape = tuple(d.dim_value for d in tensor.shape.dim)
    if not shape or 0 in shape[1:]:
        raise ArtifactError(f"{path} leaves open how large {found[0].name} is: {shape}; only the batch may be open")
    return found[0].name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape


def _tflite_input(path: Path) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    inputs = read_network(path).inputs
    if len(inputs) != 1:
        raise ArtifactError(f"{path} has {len(inputs)} inputs, expected one")
    return inputs[0].name, np.dtype(inputs[0].dtype), tuple(inputs[0].shape)


def entries(pair: Pair, scratch: Path, *, batch: int, with_controls: bool) -> tuple[list[Entry], str]:
    """Base, fused, and the controls that can be made of them, written to ``scratch`` with what feeds them.

    The text says why there are no controls; it is empty where there are, or none are wanted.
    """
    fed = feeds(pair, batch)
    plain = _saved(scratch / f"feeds_{pair.format}.npz", fed)
    found = [Entry(BASE, pair.base, plain), Entry(FUSED, pair.fused, plain)]
    if not with_controls:
        return found, ""
    make = _onnx_controls if pair.format == "onnx" else _tflite_controls
    try:
        return [*found, *make(pair, scratch, fed, plain)], ""
    except (ConversionError, ArtifactError) as err:
        return found, f"no control beside {pair.fused}: {err}"


def _onnx_controls(pair: Pair, scratch: Path, fed: Arrays, plain: Path) -> list[Entry]:
    base, fused, manifest = read_graph(pair.base), read_graph(pair.fused), pair.manifest
    found = []
    adapter = pair.fused.parent / mf.ADAPTER
    if manifest is not None and manifest.adapters and manifest.coordinates == "folded" and adapter.is_file():
        state = adapted_state(pair.base.parent, manifest, adapter)
        found += adapter_entries(base, manifest, state, scratch, fed=fed, plain=plain)
    path = scratch / "branch.onnx"
    save(controls.branches(fused, base, controls.branch_ranks(base, manifest)), path)
    return [*found, Entry(BRANCH, path, plain)]


def adapter_entries(
    base: Any, manifest: mf.Manifest, state: Mapping[str, npt.NDArray[Any]], scratch: Path, *, fed: Arrays, plain: Path
) -> list[Entry]:
    """The base with its adapters as constants, and as inputs."""
    model = controls.unmerged(base, manifest, state)
    save(model, scratch / "unmerged.onnx")
    names = [name for a in manifest.adapters for name in (a.lora_a, a.lora_b)]
    more = controls.with_inputs(model, names)
    save(model, scratch / "inputs.onnx")
    rich = _saved(scratch / "feeds_inputs.npz", {**fed, **more})
    return [Entry(UNMERGED, scratch / "unmerged.onnx", plain), Entry(INPUTS, scratch / "inputs.onnx", rich)]


def _tflite_controls(pair: Pair, scratch: Path, _: Arrays, plain: Path) -> list[Entry]:
    """A branch as .tflite, from the artifact's base.onnx with random changes of low rank."""
    manifest, weights = pair.manifest, weights_of(read_network(pair.base))
    if manifest is None or pair.folder is None or weights == "int8":
        raise ConversionError("a branch for TFLite needs an artifact, and weights in float32 or fp16")
    base = read_graph(pair.folder / mf.BASE)
    model = controls.branches(base, base, controls.branch_ranks(base, manifest))
    path = scratch / "branch.tflite"
    spec, names = manifest.input, manifest.class_names
    tflite.export(model, path, TfliteConfig(weights), spec=spec, class_names=names, name=manifest.model)
    return [Entry(BRANCH, path, plain)]


def _saved(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
