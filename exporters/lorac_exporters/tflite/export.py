"""From a canonical ONNX graph to a .tflite file: lower, store the weights as asked, describe, write."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.preprocessing import add_preprocessing
from lorac_exporters.tflite.calibrate import ranges as measured_ranges
from lorac_exporters.tflite.half import to_half
from lorac_exporters.tflite.io_types import set_io_types
from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.metadata import describe
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.patches import unpatchable
from lorac_exporters.tflite.quantize import quantize
from lorac_exporters.tflite.schema import from_bytes, save
from lorac_exporters.tflite.versions import settle
from lorac_exporters.tflite_config import IoDtype, TfliteConfig
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, ConversionError
from lorac_runtime.manifest import InputSpec

log = logging.getLogger(__name__)
Ranges = Mapping[str, tuple[float, float]]  # smallest and largest number of each activation, by name
Calibration = npt.NDArray[Any] | Ranges
RANGES = "lorac.ranges"  # the metadata buffer that keeps them: exactly, which scales and zero points would not


@dataclasses.dataclass(frozen=True)
class TfliteReport:
    """What a .tflite file is.

    ``operators`` counts each kind, the most frequent first. ``float_operators`` names those that an int8 file computes
    in float32. ``overflows`` counts weights beyond the largest fp16 number, which is stored instead. ``changed`` names
    initializers whose numbers the file holds in another form, so that they cannot be adapted in place.
    """

    weights: str
    input_dtype: str
    output_dtype: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    operators: dict[str, int]
    nbytes: int
    seconds: float
    float_operators: tuple[str, ...] = ()
    overflows: int = 0
    changed: tuple[str, ...] = ()


@dataclasses.dataclass
class Prepared:
    """A network ready to be written, and what is known of how it came to be."""

    network: Network
    config: TfliteConfig
    float_operators: tuple[str, ...]
    overflows: int
    changed: tuple[str, ...]
    ranges: Ranges | None
    seconds: float


def export(
    model: ir.Model,
    path: Path,
    config: TfliteConfig | None = None,
    *,
    spec: InputSpec,
    class_names: Sequence[str],
    name: str,
    calibration: Calibration | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> TfliteReport:
    """Write a canonical graph (`canonicalize`, or base.onnx as it is) to a .tflite file; ``path`` appears whole.

    ``spec`` says how images become the model's input, ``class_names`` are its labels, ``name`` is for people; the
    file's metadata hold all three. ``calibration``, for int8: raw images, uint8 (N, height, width, channels), signals,
    float32 (N, ...), or the `ranges_of` another int8 file of the same network.

    Raises ConversionError naming every operator that cannot be written; OutputError if ``path`` cannot be.

    >>> from lorac_exporters.tflite import TfliteConfig, export
    >>> report = export(model, Path("m.tflite"), TfliteConfig("fp16"), spec=spec, class_names=names, name="m")
    ... # doctest: +SKIP
    """
    on_progress("writing the TFLite network")
    prepared = prepare(
        model, config or TfliteConfig(), spec=spec, class_names=class_names, name=name, calibration=calibration
    )
    return write(prepared, path)


def prepare(
    model: ir.Model,
    config: TfliteConfig,
    *,
    spec: InputSpec,
    class_names: Sequence[str],
    name: str,
    calibration: Calibration | None = None,
) -> Prepared:
    """The network that `export` writes, in memory; see there. ``model`` is not changed."""
    started = time.perf_counter()
    if (config.weights == "int8") != (calibration is not None):
        raise ConversionError(
            "int8 weights need calibration images, or the ranges of another int8 file"
            if calibration is None
            else f"calibration applies to int8 weights, not to {config.weights}"
        )
    model, spec = _with_input(model, spec, config)
    network = lower(model)
    changed = unpatchable(network, _parameters(model))
    overflows, found = 0, None
    float_operators: tuple[str, ...] = ()
    if config.weights == "fp16":
        overflows = sum(to_half(network).saturated.values())
    elif calibration is not None:
        found = _ranges(network, spec, calibration)
        float_operators = _to_int8(network, config, found)
    settle(network)
    describe(network, spec, class_names, name)
    return Prepared(network, config, float_operators, overflows, changed, found, time.perf_counter() - started)


def write(prepared: Prepared, path: Path) -> TfliteReport:
    """Write what was prepared; ``path`` appears whole or stays as it was. Raises OutputError."""
    started, network = time.perf_counter(), prepared.network
    save(network, path)
    counts = collections.Counter(operator.kind for operator in network.operators)
    return TfliteReport(
        weights=prepared.config.weights,
        input_dtype=network.inputs[0].dtype,
        output_dtype=network.outputs[0].dtype,
        input_shape=network.inputs[0].shape,
        output_shape=network.outputs[0].shape,
        operators=dict(counts.most_common()),
        nbytes=path.stat().st_size,
        seconds=prepared.seconds + time.perf_counter() - started,
        float_operators=prepared.float_operators,
        overflows=prepared.overflows,
        changed=prepared.changed,
    )


def ranges_of(path: Path) -> dict[str, tuple[float, float]]:
    """The activation ranges that an int8 file of `export` was made with: exactly, so that scales come out equal.

    Raises ArtifactError if the file cannot be read or holds none.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}") from err
    found = from_bytes(content, str(path)).metadata.get(RANGES)
    if found is None:
        raise ArtifactError(f"{path} holds no activation ranges: it is not an int8 file that lorac-deploy wrote")
    try:
        return {str(name): (float(low), float(high)) for name, (low, high) in json.loads(found).items()}
    except (ValueError, TypeError, AttributeError) as err:
        raise ArtifactError(f"the activation ranges of {path} cannot be read ({err}); export it again") from err


def _with_input(model: ir.Model, spec: InputSpec, config: TfliteConfig) -> tuple[ir.Model, InputSpec]:
    """The graph with the normalisation inside, where raw uint8 images are wanted, and what its input is then."""
    if config.input_dtype == "uint8" and not spec.in_graph:
        model, spec = model.clone(), dataclasses.replace(spec, in_graph=True)
        add_preprocessing(model, spec)
    elif spec.in_graph and config.input_dtype in ("float32", "int8"):
        raise ConversionError(
            f"this model normalises raw uint8 images itself, and cannot take {config.input_dtype} ones; export the "
            "artifact without --input-uint8"
        )
    return model, spec


def _ranges(network: Network, spec: InputSpec, calibration: Calibration) -> Ranges:
    """Measured on images, unless ranges were given."""
    if isinstance(calibration, Mapping):
        return calibration
    if calibration.dtype != spec.dtype or calibration.shape[1:] != spec.raw_shape:
        expected = ", ".join(str(size) for size in spec.raw_shape)
        raise ConversionError(
            f"calibration {spec.key} are {calibration.dtype} {calibration.shape}, expected {spec.dtype} (N, {expected})"
        )
    values = preprocess(calibration, spec)
    return measured_ranges(network, values if spec.in_graph else np.ascontiguousarray(np.moveaxis(values, 1, -1)))


def _to_int8(network: Network, config: TfliteConfig, found: Ranges) -> tuple[str, ...]:
    """Quantize in place; the operators that stay in float32."""
    report = quantize(network, found)
    given = network.inputs[0].dtype if config.input_dtype is None else config.input_dtype
    set_io_types(network, input_dtype=cast(IoDtype, given), output_dtype=config.output_dtype or "float32")
    network.metadata[RANGES] = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
    return report.float_operators


def _parameters(model: ir.Model) -> list[str]:
    """Names of the float initializers; single numbers are settings, such as the limits of a Clip."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return [n for n, t in tensors.items() if t is not None and t.dtype == ir.DataType.FLOAT and t.size > 1]
