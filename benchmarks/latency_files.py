"""The files whose latency is measured: artifacts of networks with random weights, what is fused from them, controls.

The .tflite files in fp16 and int8 are the product's own, fused in place. ONNX in fp16 and int8 is made from base.onnx
and fused.onnx by onnxruntime's own converters, as somebody would who ships such files.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from benchmarks.converting import converted, saved_onnx, saved_program
from benchmarks.interpreters import LITERT_TORCH, ONNX2TF, ONNXSIM
from benchmarks.networks import CLASS_NAMES, Network
from lorac_deploy.bench import controls
from lorac_deploy.bench.pairs import BASE, BRANCH, FUSED, INPUTS, UNMERGED
from lorac_exporters import tflite
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.checks import DropinReport
from lorac_exporters.dropin import compare_files
from lorac_exporters.graph_tools import save
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.plan import LoraConfig
from lorac_exporters.tflite_config import TfliteConfig, Weights
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.patch import fuse

RANK = 4
EXTRA_NODE, UNFOLDED = "fault: extra node", "fault: unfolded branch"
OTHERS = {LITERT_TORCH: "tflite", ONNX2TF: "tflite", ONNXSIM: "onnx"}  # converters, and what they write
IMAGES = 16  # for calibration
Files = dict[str, Path]  # by variant


class Subject:
    """A network's artifact and everything that is made of it, in ``folder``; each file when first asked for."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        folder.mkdir(parents=True)
        self._graph = export_graph(network.module, network.shape)
        self.images = np.random.default_rng(0).integers(0, 256, (IMAGES, network.size, network.size, 3), dtype=np.uint8)
        self.fed: dict[str, npt.NDArray[np.float32]] = {}  # of `INPUTS` beside the images

    def files(self, kind: str, precision: Weights, *, full: bool) -> Files:
        """Files of a format and precision by variant; ``full`` with controls."""
        make: Callable[[Weights, bool], Files] = self._onnx if kind == "onnx" else self._tflite
        return make(precision, full)

    def other(self, converter: str, interpreter: Path) -> Path:
        """The base as another converter writes it, in float32 for one image. Raises RuntimeError if it fails."""
        kind = OTHERS[converter]
        target = self.folder / f"{converter}.{kind}"
        if target.exists():
            return target
        write = {LITERT_TORCH: saved_program, ONNX2TF: saved_onnx}.get(converter)
        source = self._artifact("float32") / mf.BASE if write is None else write(self.network, self.folder)
        converted(interpreter, "benchmarks.tflite_convert", converter, source, target)
        return target

    def structure(self, kind: str, precision: Weights, files: Files, variant: str) -> DropinReport:
        """How a variant compares with the base, by `verify` where both are the product's own."""
        if kind == "tflite" or precision == "float32":
            return verify(files[BASE], files[variant], artifact=None if variant != FUSED else files[BASE].parent)
        return compare_files(files[BASE], files[variant])

    def _artifact(self, weights: Weights) -> Path:
        """The artifact whose base.tflite stores its weights so, with fused.onnx and fused.tflite beside the bases."""
        out = self.folder / f"artifact-{weights}"
        if out.exists():
            return out
        config = ArtifactConfig(lora=LoraConfig(rank=RANK), engine="onnxruntime", tflite=weights)
        write_artifact(
            ir.Model.clone(self._graph),
            out,
            name=self.network.name,
            spec=self.network.spec,
            class_names=CLASS_NAMES,
            config=config,
            calibration=self.images if weights == "int8" else None,
        )
        self._fuse(out)
        return out

    def _fuse(self, artifact: Path) -> None:
        """Fuse a state that differs from the start in every adapter; the state is kept for `verify`."""
        file, rng = load_adapter(artifact / mf.ADAPTER), np.random.default_rng(0)
        moved = {name: _moved(value, rng) for name, value in file.tensors.items()}
        save_adapter(artifact / mf.ADAPTER, moved, file.metadata)
        for base, fused in ((mf.BASE, "fused.onnx"), (mf.BASE_TFLITE, "fused.tflite")):
            fuse(artifact, artifact / fused, moved, base=base)

    def _onnx(self, precision: Weights, full: bool) -> Files:
        artifact = self._artifact("float32")
        files = {BASE: artifact / mf.BASE, FUSED: artifact / "fused.onnx"}
        if full:
            files |= self._onnx_controls(files)
        if precision == "float32":
            return files
        faultless = {name: path for name, path in files.items() if name not in (EXTRA_NODE, UNFOLDED)}
        return {name: self._converted(path, precision, name) for name, path in faultless.items()}

    def _onnx_controls(self, files: Files) -> Files:
        base, fused = read_graph(files[BASE]), read_graph(files[FUSED])
        manifest, state = mf.load(files[BASE].parent), load_adapter(files[BASE].parent / mf.ADAPTER).tensors
        ranks = controls.branch_ranks(base, manifest)
        unmerged = controls.unmerged(base, manifest, state)
        made = {UNMERGED: unmerged, BRANCH: controls.branches(fused, base, ranks)}
        made |= {EXTRA_NODE: controls.extra_node(fused), UNFOLDED: controls.unfolded_branch(fused, base, ranks)}
        written = {name: self._saved(model, name) for name, model in made.items()}
        names = [name for a in manifest.adapters for name in (a.lora_a, a.lora_b)]
        self.fed = controls.with_inputs(unmerged, names)
        return written | {INPUTS: self._saved(unmerged, INPUTS)}

    def _saved(self, model: ir.Model, name: str) -> Path:
        path = self.folder / f"{name.replace(': ', '-').replace(' ', '-')}.onnx"
        save(model, path)
        return path

    def _converted(self, path: Path, precision: Weights, name: str) -> Path:
        target = self.folder / f"{path.stem}-{name.replace(' ', '-')}-{precision}.onnx"
        if not target.exists():
            feeds = {"input": self._normalised(), **self.fed} if name == INPUTS else {"input": self._normalised()}
            (to_half if precision == "fp16" else to_int8)(path, target, feeds)
        return target

    def _normalised(self) -> npt.NDArray[np.float32]:
        spec = self.network.spec
        return np.asarray((self.images.transpose(0, 3, 1, 2) * spec.scale - 0.5) / 0.25, np.float32)

    def _tflite(self, precision: Weights, full: bool) -> Files:
        artifact = self._artifact(precision)
        files = {BASE: artifact / mf.BASE_TFLITE, FUSED: artifact / "fused.tflite"}
        return files | ({BRANCH: self._tflite_branch(artifact, precision)} if full else {})

    def _tflite_branch(self, artifact: Path, precision: Weights) -> Path:
        base, fused = read_graph(artifact / mf.BASE), read_graph(artifact / "fused.onnx")
        model = controls.branches(fused, base, controls.branch_ranks(base, mf.load(artifact)))
        path = self.folder / f"branch-{precision}.tflite"
        images = self.images if precision == "int8" else None
        tflite.export(
            model,
            path,
            TfliteConfig(precision),
            spec=self.network.spec,
            class_names=CLASS_NAMES,
            name=self.network.name,
            calibration=images,
        )
        return path


def _moved(value: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return (value + 0.02 * rng.standard_normal(value.shape)).astype(np.float32)


def to_half(source: Path, target: Path, _: Any = None) -> None:
    """Weights and arithmetic in fp16, inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def to_int8(source: Path, target: Path, feeds: dict[str, npt.NDArray[Any]]) -> None:
    """Static int8 as QuantizeLinear and DequantizeLinear, per channel, calibrated on ``feeds`` image by image.

    The converter writes biases as numbers of as many bytes as they need; they are stored raw, so that sizes compare.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ships no types
        def __init__(self) -> None:
            self._left: Iterator[npt.NDArray[Any]] = iter(feeds["input"])

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            image = next(self._left, None)
            return None if image is None else {**feeds, "input": image[None]}

    with _quiet():
        quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    model = onnx.load(target)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's advice to preprocess, which a canonical graph does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
