"""`verify`: the drop-in report of a pair of files, with everything that lies beside them taken into account."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from lorac_exporters import dropin
from lorac_exporters.canonical import canonicalize
from lorac_exporters.dropin import Check, DropinReport
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.references import (
    SAMPLES,
    UNFUSED_CHECK,
    adapted_state,
    is_entry,
    no_adapter,
    patches_of,
    random_inputs,
    rounding_noise,
    run_onnx,
    unfused_logits,
)
from lorac_exporters.tflite.verify import verify_tflite
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, ConversionError

__all__ = ["random_inputs", "run_onnx", "verify"]
NAMES = {"onnx": "ONNX", "tflite": "TFLite"}


def verify(
    base: Path, fused: Path, *, artifact: Path | None = None, adapter: Path | None = None, seed: int = 0
) -> DropinReport:
    """Is ``fused`` a drop-in for ``base``? Both are ONNX, or both TFLite.

    ``artifact`` (default: the base's folder, if it holds a manifest) gives the patch table; ``adapter`` (default:
    adapter.safetensors beside ``fused``) allows the numeric check of the fused graph against the unfused
    training graph on random inputs. ``base`` may also be the user's own file the artifact was made from: then
    the canonical form of it is compared, and the differences that canonicalization makes are listed.

    Of somebody else's .tflite the structure alone is compared.

    Raises ArtifactError if a file is missing or damaged, or if the two have different formats.
    """
    if _common_format(base, fused) == "tflite":
        return verify_tflite(base, fused, artifact=artifact, adapter=adapter, seed=seed)
    folder = artifact or (base.parent if (base.parent / mf.FILE_NAME).is_file() else None)
    manifest = None if folder is None else mf.load(folder)
    if manifest is not None and folder is not None:
        mf.verify_files(folder, manifest, (mf.BASE,))  # a damaged base must not pass for somebody's own file
    if manifest is not None and folder is not None and not is_entry(base, manifest.files[mf.BASE]):
        report = _verify_own_file(base, fused, folder, manifest)
    else:
        report = dropin.compare_files(base, fused, None if manifest is None else patches_of(manifest, mf.BASE))
    if manifest is None or folder is None:
        return report if report.checks[0].verdict == "pass" else _retry_canonical(base, fused, report)
    check = _against_unfused(fused, folder, manifest, adapter or fused.parent / mf.ADAPTER, seed)
    return dataclasses.replace(report, checks=(*report.checks, check))


def _common_format(base: Path, fused: Path) -> dropin.Format:
    """The format of both. Raises ArtifactError if they have two, or cannot be read."""
    formats = [dropin.file_format(path) for path in (base, fused)]
    if formats[0] != formats[1]:
        raise ArtifactError(
            f"{base} is {NAMES[formats[0]]} and {fused} is {NAMES[formats[1]]}: a drop-in has the format of its base. "
            "Whether files of different formats answer alike, `lorac-deploy certify ARTIFACT --data IMAGES` tells"
        )
    return formats[0]


def _verify_own_file(base: Path, fused: Path, folder: Path, manifest: mf.Manifest) -> DropinReport:
    """The user's own file as base: its interface must be fused's, its canonical form must be base.onnx."""
    inner = dropin.compare_files(folder / mf.BASE, fused, patches_of(manifest, mf.BASE))
    own = _own_checks(base, folder / mf.BASE)
    if manifest.additions is not None:
        own.append(Check("added modules", "fail", str(manifest.additions)))
    return DropinReport(str(base), str(fused), (*own, *inner.checks))


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
    name = UNFUSED_CHECK
    if not adapter.is_file():
        return Check(name, "not checked", no_adapter(adapter))
    images = random_inputs(manifest.input, SAMPLES, seed=seed)
    expected = unfused_logits(folder, manifest, adapted_state(folder, manifest, adapter), images)
    noise = rounding_noise(folder / mf.BASE, images)
    return dropin.numeric_check(name, expected, run_onnx(fused, images), manifest.tolerances["logits"], noise=noise)
