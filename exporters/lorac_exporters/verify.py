"""`verify`: the drop-in report of a pair of files, with everything that lies beside them taken into account."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters import dropin
from lorac_exporters.canonical import canonicalize
from lorac_exporters.dropin import Check, DropinReport
from lorac_exporters.onnx_file import read_graph
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import check_adapter, load_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import ArtifactError, ConversionError

SAMPLES = 8


def verify(
    base: Path, fused: Path, *, artifact: Path | None = None, adapter: Path | None = None, seed: int = 0
) -> DropinReport:
    """Is ``fused`` a drop-in for ``base``?

    ``artifact`` (default: the base's folder, if it holds a manifest) gives the patch table; ``adapter`` (default:
    adapter.safetensors beside ``fused``) allows the numeric check of the fused graph against the unfused
    training graph on random inputs. ``base`` may also be the user's own file the artifact was made from: then
    the canonical form of it is compared, and the differences that canonicalization makes are listed.

    Raises ArtifactError if a file is missing or damaged.
    """
    folder = artifact or (base.parent if (base.parent / mf.FILE_NAME).is_file() else None)
    manifest = None if folder is None else mf.load(folder)
    if manifest is not None and folder is not None:
        mf.verify_files(folder, manifest, (mf.BASE,))  # a damaged base must not pass for somebody's own file
    if manifest is not None and folder is not None and not _is_base(base, manifest):
        report = _verify_own_file(base, fused, folder, manifest)
    else:
        report = dropin.compare_files(base, fused, None if manifest is None else manifest.patches)
    if manifest is None or folder is None:
        return report if report.checks[0].verdict == "pass" else _retry_canonical(base, fused, report)
    check = _against_unfused(fused, folder, manifest, adapter or fused.parent / mf.ADAPTER, seed)
    return dataclasses.replace(report, checks=(*report.checks, check))


def _is_base(path: Path, manifest: mf.Manifest) -> bool:
    entry = manifest.files[mf.BASE]
    if not path.is_file():
        raise ArtifactError(f"{path} not found")
    return path.stat().st_size == entry.nbytes and mf.sha256(path) == entry.sha256


def _verify_own_file(base: Path, fused: Path, folder: Path, manifest: mf.Manifest) -> DropinReport:
    """The user's own file as base: its interface must be fused's, its canonical form must be base.onnx."""
    inner = dropin.compare_files(folder / mf.BASE, fused, manifest.patches)
    return DropinReport(str(base), str(fused), (*_own_checks(base, folder / mf.BASE), *inner.checks))


def _retry_canonical(base: Path, fused: Path, report: DropinReport) -> DropinReport:
    """No manifest and another structure: perhaps the user's own file; compare its canonical form."""
    try:
        checks = _own_checks(base, fused)
    except ConversionError:
        return report
    return report if any(c.verdict == "fail" for c in checks) else dataclasses.replace(report, checks=tuple(checks))


def _own_checks(own: Path, canonical_file: Path) -> list[Check]:
    old, new = dropin.read_model(own), dropin.read_model(canonical_file)
    interface = [
        dropin.interface_check("inputs", old.graph.input, new.graph.input),
        dropin.interface_check("outputs", old.graph.output, new.graph.output),
    ]
    canonical = canonicalize(read_graph(own))
    listed = "; ".join(canonical.changes) or "none"
    structure = [
        dataclasses.replace(c, name=f"canonical {c.name}")
        for c in dropin.compare_models(ir.to_proto(canonical.model), new)
        if c.name not in ("inputs", "outputs")
    ]
    return [*interface, Check("differences by canonicalization", "pass", listed), *structure]


def _against_unfused(fused: Path, folder: Path, manifest: mf.Manifest, adapter: Path, seed: int) -> Check:
    name = "fused against the unfused training graph"
    if not adapter.is_file():
        return Check(name, "not checked", f"{adapter.name} not found beside the fused file; name it with --adapter")
    file = load_adapter(adapter)
    check_adapter(manifest, file)
    images = random_inputs(manifest.input, SAMPLES, seed=seed)
    engine = open_engine(folder, manifest, threads=None)
    engine.load_state(file.tensors)
    _, expected = engine.eval_step(images, np.zeros(SAMPLES, np.int64))
    return dropin.numeric_check(name, expected, run_onnx(fused, images), manifest.tolerances["logits"])


def random_inputs(spec: mf.InputSpec, count: int, *, seed: int) -> npt.NDArray[Any]:
    """Random inputs in the form the model takes: (count, C, H, W) float32, or (count, H, W, C) uint8."""
    rng = np.random.default_rng(seed)
    channels, height, width = spec.shape
    if spec.in_graph:
        return rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return rng.standard_normal((count, channels, height, width), dtype=np.float32)


def run_onnx(path: Path, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The only output of an ONNX classifier, (N, classes)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(logits)
