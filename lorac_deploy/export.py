"""`export_training_artifact`: from a checkpoint or any ONNX CNN to the folder that a device trains with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_deploy.checkpoint import load_checkpoint
from lorac_exporters.artifact import ArtifactConfig, ExportReport, write_artifact
from lorac_exporters.artifact_folder import check_replaceable
from lorac_exporters.canonical import canonicalize
from lorac_exporters.graph_tools import static_dims
from lorac_exporters.heads import find_head
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.shapes import fix_image_size
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.data import load_data
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import InputSpec

log = logging.getLogger(__name__)
PIXEL_SCALE = 1 / 255


@dataclasses.dataclass(frozen=True)
class OnnxSource:
    """A user's own ONNX classifier and what its file does not say.

    ``mean`` and ``std`` are per channel, in units of ``pixel * scale``. ``num_classes`` other than the graph's
    output width replaces the head (None keeps it). ``size`` is (height, width) where the file leaves it open.
    """

    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = PIXEL_SCALE
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None


def export_training_artifact(
    source: Path | OnnxSource,
    out: Path,
    *,
    config: ArtifactConfig | None = None,
    adapter: Path | None = None,
    input_uint8: bool = False,
    calibration: Path | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> ExportReport:
    """Write a training artifact into the folder ``out``.

    ``source`` is a checkpoint folder (`lorac-deploy train`) or an `OnnxSource`. ``adapter`` starts the device
    from an adapter trained in PyTorch. ``input_uint8`` puts normalisation into the graph, which then takes raw
    uint8 images, (N, H, W, C). ``calibration``: images (an ``.npz`` file or class folders) from which an int8
    base.tflite takes its ranges.

    Raises ConversionError, CheckpointError, AdapterError, DataError, OutputError; see `lorac_runtime.errors`.
    ValueError if ``calibration`` and ``config.tflite`` do not go together.

    >>> from lorac_deploy import ArtifactConfig, LoraConfig, export_training_artifact
    >>> config = ArtifactConfig(lora=LoraConfig(rank=4))
    >>> report = export_training_artifact(Path("base"), Path("artifact"), config=config)  # doctest: +SKIP
    """
    check_replaceable(out)
    config = config or ArtifactConfig()
    if (config.tflite == "int8") != (calibration is not None):
        raise ValueError(f"calibration and tflite 'int8' go together, got {calibration} and {config.tflite!r}")
    given = _from_onnx(source) if isinstance(source, OnnxSource) else _from_checkpoint(source)
    images = None if calibration is None else _images(calibration, given)
    return write_artifact(
        given.model,
        out,
        name=given.name,
        spec=dataclasses.replace(given.spec, in_graph=input_uint8),
        class_names=given.class_names,
        new_head=given.new_head,
        config=config,
        adapter=adapter,
        calibration=images,
        on_progress=on_progress,
    )


@dataclasses.dataclass(frozen=True)
class _Given:
    """A network and what its source says of it."""

    model: ir.Model
    name: str
    spec: InputSpec
    class_names: tuple[str, ...]
    new_head: bool = False


def _images(path: Path, given: _Given) -> npt.NDArray[np.uint8]:
    """The images of local data, uint8 (N, H, W, C); their labels do not matter here."""
    return load_data(path, given.spec, len(given.class_names), given.class_names, require_classes=1).images


def _from_checkpoint(folder: Path) -> _Given:
    checkpoint = load_checkpoint(folder)
    graph = export_graph(checkpoint.module, checkpoint.input.shape)
    return _Given(graph, checkpoint.spec.name, checkpoint.input, checkpoint.class_names)


def _from_onnx(source: OnnxSource) -> _Given:
    model = read_graph(source.path)
    if source.size is not None:
        fix_image_size(model, source.size)
    spec = _input_spec(model, source)
    width = find_head(canonicalize(model, fold=False).model).classes
    classes = width if source.num_classes is None else source.num_classes
    if classes < 2:
        raise ConversionError(f"a classifier needs at least 2 classes, got --num-classes {classes}")
    return _Given(model, source.path.stem, spec, _class_names(source, classes), new_head=classes != width)


def _input_spec(model: ir.Model, source: OnnxSource) -> InputSpec:
    shape = _input_shape(model, source)
    if len(source.mean) != shape[0] or len(source.std) != shape[0]:
        raise ConversionError(
            f"{source.path} takes {shape[0]} channels, but mean has {len(source.mean)} values and std "
            f"{len(source.std)}; give one value per channel"
        )
    return InputSpec(str(model.graph.inputs[0].name), shape, source.scale, source.mean, source.std)


def _class_names(source: OnnxSource, classes: int) -> tuple[str, ...]:
    names = source.class_names or tuple(str(i) for i in range(classes))
    if len(names) != classes:
        raise ConversionError(f"{len(names)} class names were given for {classes} classes")
    return names


def _input_shape(model: ir.Model, source: OnnxSource) -> tuple[int, int, int]:
    dims = static_dims(model.graph.inputs[0])
    if dims is None or len(dims) != 4 or dims[1] is None:
        raise ConversionError(f"{source.path}: input must be (batch, channels, height, width), the file says {dims}")
    if dims[2] is None or dims[3] is None:
        raise ConversionError(f"{source.path} leaves height and width open; say them with --size HEIGHT,WIDTH")
    return dims[1], dims[2], dims[3]
