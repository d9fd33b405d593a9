"""`verify` for TFLite: the structure and bytes of a pair of files, and what the fused one answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_exporters.checks import BYTES_CHECK, Check, DropinReport, numeric_check
from lorac_exporters.references import (
    SAMPLES,
    UNFUSED_CHECK,
    adapted_state,
    is_entry,
    no_adapter,
    patches_of,
    random_raw,
    rounding_noise,
    run_onnx,
    unfused_logits,
)
from lorac_exporters.running import joined
from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.dropin import compare_files
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.reading import read_network
from lorac_exporters.tflite.stored_check import NAME as PATCHED_CHECK
from lorac_exporters.tflite.stored_check import stored_check
from lorac_runtime import manifest as mf
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, ConversionError

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]
State = Mapping[str, npt.NDArray[Any]]
ROUNDED_SAMPLES = 32  # of fp16 and int8 files: their errors are told by their spread, not by the largest
SLACK = 5.0  # how much larger the error of a fused fp16 or int8 file may be than its base's own
SPREAD = 0.5  # of the logits' standard deviation: beyond it an int8 file answers something else
ADVICE = (
    "; activations have left the ranges of the base: calibrate anew with `lorac-deploy export --weights int8 "
    "--calibration`, and see with --data what the file answers to real images"
)


def verify_tflite(base: Path, fused: Path, *, artifact: Path | None, adapter: Path | None, seed: int) -> DropinReport:
    """Is the .tflite ``fused`` a drop-in for ``base``? See `lorac_exporters.verify.verify` for the arguments.

    A base that is not the artifact's base.tflite has no patch table, and no adapter: its structure alone is compared.

    Raises ArtifactError if a file is missing or damaged, or if ``base`` is not the base.tflite of ``artifact``.
    """
    beside = base.parent if (base.parent / mf.FILE_NAME).is_file() else None
    folder = artifact or beside
    if folder is None:
        return compare_files(base, fused)
    manifest = mf.load(folder)
    if not _is_base(base, folder, manifest):
        if artifact is not None:
            raise ArtifactError(
                f"{base} is not the {mf.BASE_TFLITE} that the manifest of {folder} describes (another sha256); compare "
                "with that file, or leave --artifact out"
            )
        return _structure_only(compare_files(base, fused), folder)
    report = compare_files(base, fused, patches_of(manifest, mf.BASE_TFLITE))
    checks = _adapter_checks(fused, folder, manifest, adapter or fused.parent / mf.ADAPTER, seed)
    return dataclasses.replace(report, checks=(*report.checks, *checks))


def _is_base(base: Path, folder: Path, manifest: mf.Manifest) -> bool:
    """Whether ``base`` has a patch table. Raises ArtifactError if the artifact's own file is damaged."""
    if mf.BASE_TFLITE not in manifest.files:
        return False
    mf.verify_files(folder, manifest, (mf.BASE_TFLITE,))
    return is_entry(base, manifest.files[mf.BASE_TFLITE])


def _structure_only(report: DropinReport, folder: Path) -> DropinReport:
    """The report of a file that only lies beside a manifest."""
    reason = f"it is not the {mf.BASE_TFLITE} that the manifest of {folder} describes, so there is no patch table"
    *checks, _ = report.checks  # the last one is that of the bytes
    return dataclasses.replace(report, checks=(*checks, Check(BYTES_CHECK, "not checked", reason)))


def _adapter_checks(fused: Path, folder: Path, manifest: mf.Manifest, adapter: Path, seed: int) -> list[Check]:
    """What can be said once the adapter is known that the file was fused from."""
    if not adapter.is_file():
        return [Check(name, "not checked", no_adapter(adapter)) for name in (PATCHED_CHECK, UNFUSED_CHECK)]
    mf.verify_files(folder, manifest, (mf.BASE,))
    state = adapted_state(folder, manifest, adapter)
    return [stored_check(fused, folder, manifest, state), _answers_check(fused, folder, manifest, state, seed)]


def _answers_check(fused: Path, folder: Path, manifest: mf.Manifest, state: State, seed: int) -> Check:
    """The fused file against the training graph with the adapter beside the weights, on random images."""
    exact = manifest.tflite is None or manifest.tflite.weights == "float32"
    images = random_raw(manifest.input, SAMPLES if exact else ROUNDED_SAMPLES, seed=seed)
    inputs = preprocess(images, manifest.input)
    try:
        got = answers(fused, images, manifest.input)
        own = None if exact else answers(folder / mf.BASE_TFLITE, images, manifest.input)
    except ConversionError as err:  # no TFLite runtime is installed
        return Check(UNFUSED_CHECK, "not checked", str(err))
    expected = unfused_logits(folder, manifest, state, inputs)
    if own is None:
        noise = rounding_noise(folder / mf.BASE, inputs)
        return numeric_check(UNFUSED_CHECK, expected, got, manifest.tolerances["logits"], noise=noise)
    step = output_step(read_network(folder / mf.BASE_TFLITE))
    base = (run_onnx(folder / mf.BASE, inputs), own)
    return rounded_check(UNFUSED_CHECK, (expected, got), base, manifest.tolerances["logits"], step=step)


def answers(path: Path, images: npt.NDArray[np.uint8], spec: mf.InputSpec) -> Floats:
    """The answers (n, classes, ...) to raw images, several outputs as `running.joined` has them.

    Raises ConversionError without a TFLite runtime.
    """
    found = TfliteAnswers(path, read_network(path), spec)(images)
    # channels first, as ONNX has them
    return joined([np.moveaxis(answer, -1, 1) for answer in found.values()])


def rounded_check(name: str, fused: Pair, base: Pair, tolerance: float, *, step: float | None = None) -> Check:
    """Whether a fused fp16 or int8 file is not much further from its float original than the base is from its own.

    ``fused`` and ``base`` are (float32, rounded) logits of the same images; ``step`` is the scale of int8 logits. How
    much rounding costs depends on the network, its depth and its ranges, so the base's own error is the yardstick: of
    the root mean square, which is steady where the largest difference is not, `SLACK` times as much is allowed, and
    the ``tolerance`` for float32 on top. On ResNet-18 a fused file had 0.6 to 1.4 times the error of its base in fp16,
    1.4 to 1.6 times in int8.

    An adapter may lead activations out of the ranges that an int8 base was calibrated with. Then a file that was fused
    rightly (the check of the patched numbers tells) is further off, and how far on real images random ones cannot say:
    it fails where the error is beyond `SPREAD` of the logits' own spread, and short of that the report says so.

    >>> one = np.ones((2, 3), np.float32)
    >>> rounded_check("answers", (one, one * 1.5), (one, one * 1.2), 1e-4).verdict
    'pass'
    """
    (expected, got), (original, own) = fused, base
    if expected.shape != got.shape or expected.size == 0 or own.shape != original.shape:
        return Check(name, "fail", f"logits of shape {got.shape}, expected {expected.shape}")
    error, yardstick = _rms(got, expected), _rms(own, original)
    near = SLACK * yardstick + tolerance * max(1.0, float(np.max(np.abs(expected))))
    bound = near if step is None else max(near, SPREAD * float(np.std(expected)))
    same = float(np.mean(np.argmax(got, axis=1) == np.argmax(expected, axis=1)))
    text = f"root mean square difference {error:.2e}{_in_steps(error, step)}, allowed {bound:.2e}, the base's own "
    text += f"{yardstick:.2e}{_in_steps(yardstick, step)}; same class for {same:.1%} of {len(got)} images"
    return Check(name, "pass" if error <= bound else "fail", text if error <= near or step is None else text + ADVICE)


def output_step(network: Network) -> float | None:
    """The scale of a network's int8 logits, whether they leave it as they are or as float32; None for others."""
    output = network.outputs[0]
    producer = network.producer(output)
    if output.quantization is None and producer is not None and producer.kind == "DEQUANTIZE":
        stored = producer.inputs[0]
        output = output if stored is None else stored
    return None if output.quantization is None else float(output.quantization.scale[0])


def _in_steps(error: float, step: float | None) -> str:
    return "" if step is None else f" ({error / step:.1f} output steps)"


def _rms(a: Floats, b: Floats) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
