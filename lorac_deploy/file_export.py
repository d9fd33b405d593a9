"""`export_file`: an inference file from a training artifact, with an adapter fused into it or without."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters import tflite
from lorac_exporters.tflite.answers import TfliteAnswers, model_input
from lorac_exporters.tflite.calibrate import saturation
from lorac_exporters.tflite.export import Calibration
from lorac_exporters.tflite.reading import read_network
from lorac_exporters.verify import run_onnx
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, to_manifest_coordinates
from lorac_runtime.data import LocalData, load_data, load_samples, preprocess
from lorac_runtime.errors import ArtifactError, DataError, OutputError
from lorac_runtime.files import staged
from lorac_runtime.manifest import Manifest
from lorac_runtime.patch import batchnorm_tensors, fuse
from lorac_runtime.task_data import load_task_data
from lorac_runtime.tasks import LABELS, SEGMENTATION, require_classifier

log = logging.getLogger(__name__)
Target = Literal["tflite", "onnx"]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[Any]
TARGETS: tuple[Target, ...] = ("tflite", "onnx")
BATCH = 64  # images computed at once
CUT_OFF_IMAGES = 128  # about so many, spread over all, tell whether ranges are wide enough
CUT_OFF_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What a file answered to labelled images: shares from 0 to 1, of images, or where masks are given of pixels.

    ``accuracy`` is over those with a label. ``agreement`` is the share to which it gave the same class as the float32
    ONNX file, and ``max_difference`` the largest difference between their logits.
    """

    file: str
    accuracy: float
    agreement: float
    max_difference: float


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What was written. ``tflite`` is None for an ONNX file; ``accuracies`` is empty without data.

    ``cut_off``: of an int8 file with data, the activations that lie at the ends of their range most often, and the
    share of their numbers that does (from 0 to 1), the largest first. ``by_pixel``: what the shares in ``accuracies``
    are of.
    """

    path: Path
    nbytes: int
    tflite: tflite.TfliteReport | None
    accuracies: tuple[Accuracy, ...]
    images: int
    seconds: float
    cut_off: tuple[tuple[str, float], ...] = ()
    by_pixel: bool = False


def export_file(
    artifact: Path,
    out: Path,
    *,
    to: Target,
    adapter: Path | None = None,
    config: tflite.TfliteConfig | None = None,
    calibration: Path | None = None,
    data: Path | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> FileReport:
    """Write the network of a training artifact to the file ``out``, in the format ``to``.

    ``adapter`` is fused into it. ``config`` applies to TFLite. ``calibration`` are images (an ``.npz`` file or
    folders), with or without labels, for int8; without it int8 takes the ranges of the artifact's own base.tflite, if
    that is int8. With labelled ``data`` (of segmentation with masks) the report says how the file answers, beside the
    float32 ONNX file. ``out`` appears whole or not at all, and no file of the artifact is ever overwritten.

    Raises ArtifactError, AdapterError, DataError, ConversionError or OutputError; ValueError for settings that do not
    go together.

    >>> from lorac_exporters.tflite import TfliteConfig
    >>> export_file(Path("artifact"), Path("small.tflite"), to="tflite", config=TfliteConfig("fp16"))  # doctest: +SKIP
    """
    started = time.perf_counter()
    problem = config_problem(to, config, calibration)
    if problem:
        raise ValueError(problem)
    manifest = mf.load(artifact)
    _refuse_own_files(artifact, out, manifest)
    tests = None if data is None else _local(data, manifest)
    known = _calibration(artifact, manifest, config, calibration)
    with _network(artifact, manifest, adapter) as network, staged(out) as part:
        report = None
        if to == "tflite":
            report = _write_tflite(network, part, manifest, config, known, on_progress)
        else:
            part.write_bytes(network.read_bytes())
        on_progress("comparing the answers")
        rows = () if tests is None else tuple(_accuracies(network, part, tests, manifest, report))
        cut_off = _cut_off(part, tests, manifest) if tests is not None and known is not None else ()
        nbytes = part.stat().st_size
    count = 0 if tests is None else len(tests)
    seconds = time.perf_counter() - started
    return FileReport(out, nbytes, report, rows, count, seconds, cut_off, manifest.task is not None)


def config_problem(to: Target, config: tflite.TfliteConfig | None, calibration: Path | None) -> str:
    """Why these settings of `export_file` do not go together; empty if they do.

    >>> config_problem("onnx", None, Path("local.npz"))
    'calibration data apply to int8 weights of a TFLite file only'
    """
    if to not in TARGETS:
        return f"format {to!r} is not one of {', '.join(TARGETS)}"
    if to == "onnx" and config is not None:
        return "weights and dtypes are chosen for TFLite only; an ONNX file is base.onnx with other numbers"
    if calibration is not None and (config is None or config.weights != "int8"):
        return "calibration data apply to int8 weights of a TFLite file only"
    return ""


def _write_tflite(
    network: Path,
    target: Path,
    manifest: Manifest,
    config: tflite.TfliteConfig | None,
    calibration: Calibration | None,
    on_progress: Callable[[str], None],
) -> tflite.TfliteReport:
    return tflite.export(
        ir.load(network),
        target,
        config,
        spec=manifest.input,
        class_names=manifest.class_names,
        name=manifest.model,
        calibration=calibration,
        on_progress=on_progress,
    )


@contextlib.contextmanager
def _network(artifact: Path, manifest: Manifest, adapter: Path | None) -> Iterator[Path]:
    """The ONNX file to write: base.onnx, or a fused copy for the length of the block."""
    mf.verify_files(artifact, manifest, (mf.BASE,))
    if adapter is None:
        yield artifact / mf.BASE
        return
    state = to_manifest_coordinates(manifest, batchnorm_tensors(artifact, manifest), load_adapter(adapter))
    with tempfile.TemporaryDirectory(prefix="lorac-deploy.") as folder:
        fuse(artifact, Path(folder) / "fused.onnx", state)
        yield Path(folder) / "fused.onnx"


def _calibration(
    artifact: Path, manifest: Manifest, config: tflite.TfliteConfig | None, images: Path | None
) -> Calibration | None:
    """For int8: the images, else the activation ranges of the artifact's own int8 file."""
    if config is None or config.weights != "int8":
        return None
    if images is not None:
        return load_samples(images, manifest.input)
    if manifest.tflite is None or manifest.tflite.weights != "int8":
        raise ArtifactError(
            f"{artifact} has no int8 {mf.BASE_TFLITE} whose ranges could be taken over; give images with --calibration"
        )
    mf.verify_files(artifact, manifest, (mf.BASE_TFLITE,))
    return tflite.ranges_of(artifact / mf.BASE_TFLITE)


def _accuracies(
    onnx: Path, written: Path, tests: LocalData, manifest: Manifest, report: tflite.TfliteReport | None
) -> Iterator[Accuracy]:
    """The float32 ONNX file, then the TFLite file if that was written."""
    expected = np.concatenate([run_onnx(onnx, preprocess(images, manifest.input)) for images in _batches(tests)])
    labels = tests.known_labels() if manifest.task is None else tests.targets[LABELS]
    counted = np.ones(labels.shape, bool) if manifest.task is None else labels != manifest.task.ignore_index
    yield _accuracy("float32 ONNX", expected, expected, (labels, counted))
    if report is not None:
        answers = TfliteAnswers(written, read_network(written), manifest.input)
        found = np.concatenate([next(iter(answers(images).values())) for images in _batches(tests)])
        channels_first = np.moveaxis(found, -1, 1)  # as ONNX has them
        yield _accuracy(f"{report.weights} TFLite", channels_first, expected, (labels, counted))


def _cut_off(written: Path, tests: LocalData, manifest: Manifest) -> tuple[tuple[str, float], ...]:
    """Activations of an int8 file whose numbers lie at the ends of their range most often."""
    network = read_network(written)
    images = tests.images[:: max(1, len(tests) // CUT_OFF_IMAGES)]
    shares = saturation(network, model_input(images, network.inputs[0], manifest.input))
    return tuple(sorted(shares.items(), key=lambda item: -item[1])[:CUT_OFF_LISTED])


def _accuracy(name: str, logits: Floats, expected: Floats, labels: tuple[Labels, Labels]) -> Accuracy:
    """By image, or by pixel; ``labels`` are those, and which of them count."""
    guesses, (known, counted) = logits.argmax(1), labels
    return Accuracy(
        file=name,
        accuracy=float(np.mean((guesses == known)[counted])),
        agreement=float(np.mean(guesses == expected.argmax(1))),
        max_difference=float(np.max(np.abs(logits - expected))),
    )


def _batches(tests: LocalData) -> Iterator[npt.NDArray[np.uint8]]:
    for start in range(0, len(tests), BATCH):
        yield tests.images[start : start + BATCH]


def _local(path: Path, manifest: Manifest) -> LocalData:
    if manifest.task is not None and manifest.task.kind == SEGMENTATION:
        data = load_task_data(path, manifest, manifest.task)
        if LABELS not in data.targets:
            raise DataError(f"{path} has no {LABELS}: how a file answers is told by the class of each pixel")
        return data
    why = "answers to data are compared by the class that is said"
    require_classifier(path, manifest.task, why, "leave the data out, and check the file with `lorac-deploy verify`")
    return load_data(path, manifest.input, manifest.output.classes, manifest.class_names, require_classes=1)


def _refuse_own_files(artifact: Path, out: Path, manifest: Manifest) -> None:
    for name in (mf.FILE_NAME, *manifest.files):
        with contextlib.suppress(OSError):  # one of them does not exist, or cannot be reached: writing will tell
            if out.samefile(artifact / name):
                raise OutputError(f"{out} is a file of the training artifact; name another output file")
