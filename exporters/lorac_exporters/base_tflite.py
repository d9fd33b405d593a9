"""base.tflite of a training artifact: the same network as base.onnx, with a patch table of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lorac_exporters.choices import TfliteChoice as TfliteChoice
from lorac_exporters.graphs import Graphs
from lorac_exporters.tflite.export import Prepared, TfliteReport, prepare, write
from lorac_exporters.tflite.patches import patch_entries, with_partners
from lorac_exporters.tflite_config import TfliteConfig
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ConversionError

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class TfliteBase:
    """What the manifest says of base.tflite; without one all but ``reason`` and ``shapes`` is empty.

    ``shapes`` are the tensors that base.onnx needs patch entries of: an int8 weight that changes takes its bias along.
    """

    shapes: Shapes
    entry: mf.TfliteEntry | None = None
    patches: tuple[mf.Patch, ...] = ()
    report: TfliteReport | None = None
    reason: str = ""


def write_base(
    choice: TfliteChoice,
    graphs: Graphs,
    folder: Path,
    *,
    name: str,
    class_names: tuple[str, ...],
    images: npt.NDArray[Any] | None,
) -> TfliteBase:
    """Write ``folder``/base.tflite as ``choice`` says. ``images`` (N, H, W, C), or signals, calibrate int8.

    Raises ConversionError if the network cannot be written so, or could not be adapted afterwards; ``auto`` then goes
    without, and says why.
    """
    wanted = graphs.patched_shapes()
    if choice == "none":
        return TfliteBase(wanted, reason="not asked for")
    if choice == "int8" and graphs.plan.modules:
        raise ConversionError(
            f"method {graphs.plan.method} does not go with --tflite int8: the ranges of activations come from "
            "calibration images, and what the added modules give is constant until they are trained; "
            "use float32 or fp16"
        )
    config = TfliteConfig("float32" if choice == "auto" else choice)
    try:
        prepared = prepare(
            graphs.base.model,
            config,
            spec=graphs.spec,
            class_names=class_names,
            name=name,
            calibration=images,
        )
        return _written(prepared, folder, graphs)
    except ConversionError as err:
        if choice != "auto":
            raise
        (folder / mf.BASE_TFLITE).unlink(missing_ok=True)
        return TfliteBase(wanted, reason=str(err))


def _written(prepared: Prepared, folder: Path, graphs: Graphs) -> TfliteBase:
    path, network = folder / mf.BASE_TFLITE, prepared.network
    report = write(prepared, path)
    wanted = with_partners(network, graphs.patched_shapes())
    shapes = {name: value.shape for name, value in graphs.base.values.items() if name in wanted}
    entry = mf.TfliteEntry(
        report.weights, report.input_dtype, report.output_dtype, report.input_shape, report.output_shape
    )
    patches = patch_entries(network, path.read_bytes(), mf.BASE_TFLITE, shapes)
    return TfliteBase(shapes, entry, patches, report)
