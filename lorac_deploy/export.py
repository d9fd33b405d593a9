"""`export_training_artifact`: from a checkpoint or any ONNX classifier to the folder that a device trains with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from lorac_runtime.data import LocalData, load_data, load_samples
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import InputSpec
from lorac_runtime.manifest_checks import input_problems
from lorac_runtime.tasks import CLASSIFICATION, CUSTOM, SEGMENTATION

log = logging.getLogger(__name__)
PIXEL_SCALE = 1 / 255


@dataclasses.dataclass(frozen=True)
class OnnxSource:
    """A user's own ONNX classifier and what its file does not say.

    What it takes is told by the axes of its input: images, uint8, by four; float32 signals (batch, channels, length)
    or (batch, features) by fewer. ``mean`` and ``std`` are per channel (one for all features), in units of ``value *
    scale``; ``scale`` None is 1/255 for images, 1 for signals. ``num_classes`` other than the graph's output width
    replaces the head (None keeps it). ``size`` is (height, width) where the file leaves it open.
    """

    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float | None = None
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
    anchors: Path | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> ExportReport:
    """Write a training artifact into the folder ``out``.

    ``source`` is a checkpoint folder (`lorac-deploy train`) or an `OnnxSource`. ``adapter`` starts the device
    from an adapter trained in PyTorch. ``input_uint8`` puts normalisation into the graph, which then takes raw
    uint8 images, (N, H, W, C). ``calibration``: images (an ``.npz`` file or class folders) or signals (``.npz``) from
    which an int8 base.tflite takes its ranges. ``anchors``: a few with labels, packed into the artifact; a device that
    keeps a model only if it is better (`lorac_runtime.adapting`) sees to it that what it learns does not cost these.

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
    task = config.task.kind
    given = _from_onnx(source, task) if isinstance(source, OnnxSource) else _from_checkpoint(source, task)
    if anchors is not None and task != CLASSIFICATION:
        raise ValueError(f"anchors are samples with a class, and the task is {task}: leave them out")
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
        anchors=None if anchors is None else _samples(anchors, given, require_classes=1),
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


def _images(path: Path, given: _Given) -> npt.NDArray[Any]:
    """The images (or signals) of local data, as `LocalData` has them; their labels do not matter here."""
    return load_samples(path, given.spec)


def _samples(path: Path, given: _Given, *, require_classes: int) -> LocalData:
    return load_data(path, given.spec, len(given.class_names), given.class_names, require_classes=require_classes)


def _from_checkpoint(folder: Path, task: str) -> _Given:
    checkpoint = load_checkpoint(folder)
    if task not in (checkpoint.spec.task, CUSTOM):
        known = checkpoint.spec.task
        raise ValueError(f"{folder} is a network for {known}: ArtifactConfig(task=TaskConfig({known!r})), got {task!r}")
    graph = export_graph(checkpoint.module, checkpoint.input.shape)
    names = () if task == CUSTOM else checkpoint.class_names
    return _Given(graph, checkpoint.spec.name, checkpoint.input, names)


def _from_onnx(source: OnnxSource, task: str) -> _Given:
    model = read_graph(source.path)
    if source.size is not None:
        fix_image_size(model, source.size)
    spec = _input_spec(model, source)
    if task != CLASSIFICATION:
        return _Given(model, source.path.stem, spec, _names_of_outputs(model, source, task))
    width = find_head(canonicalize(model, fold=False).model).classes
    classes = width if source.num_classes is None else source.num_classes
    if classes < 2:
        raise ConversionError(f"a classifier needs at least 2 classes, got --num-classes {classes}")
    return _Given(model, source.path.stem, spec, _class_names(source, classes), new_head=classes != width)


def _names_of_outputs(model: ir.Model, source: OnnxSource, task: str) -> tuple[str, ...]:
    """The classes of segmentation; other tasks have none."""
    if task != SEGMENTATION:
        if source.class_names is not None or source.num_classes is not None:
            raise ConversionError(f"the task {task} has no classes: leave their number and their names out")
        return ()
    outputs = canonicalize(model, fold=False, head=False).model.graph.outputs
    dims = static_dims(outputs[0]) or ()
    if len(dims) < 3 or dims[1] is None:
        raise ConversionError(
            f"{source.path}: output {outputs[0].name!r} has shape {outputs[0].shape}, expected scores of classes for "
            "each pixel, (batch, classes, height, width)"
        )
    if source.num_classes not in (None, dims[1]):
        raise ConversionError(
            f"num_classes is {source.num_classes}, the network has scores of {dims[1]}: only classifiers get a new head"
        )
    return _class_names(source, dims[1])


def _input_spec(model: ir.Model, source: OnnxSource) -> InputSpec:
    shape = _input_shape(model, source)
    dtype, scale = ("uint8", PIXEL_SCALE) if len(shape) == 3 else ("float32", 1.0)
    scale = scale if source.scale is None else source.scale
    spec = InputSpec(str(model.graph.inputs[0].name), shape, scale, source.mean, source.std, dtype=dtype)
    if len(source.mean) != spec.channels or len(source.std) != spec.channels:
        raise ConversionError(
            f"{source.path} takes {'features' if len(shape) == 1 else f'{shape[0]} channels'}, but mean has "
            f"{len(source.mean)} values and std {len(source.std)}; give one value per channel (of features one for all)"
        )
    problems = input_problems(spec)
    if problems:
        raise ConversionError(listed(f"the input of {source.path} cannot be used:", problems))
    return spec


def _class_names(source: OnnxSource, classes: int) -> tuple[str, ...]:
    names = source.class_names or tuple(str(i) for i in range(classes))
    if len(names) != classes:
        raise ConversionError(f"{len(names)} class names were given for {classes} classes")
    return names


def _input_shape(model: ir.Model, source: OnnxSource) -> tuple[int, ...]:
    dims = static_dims(model.graph.inputs[0])
    if dims is None or len(dims) not in (2, 3, 4) or dims[1] is None:
        raise ConversionError(
            f"{source.path}: input must be (batch, channels, height, width), or of signals (batch, channels, length) "
            f"or (batch, features), the file says {dims}"
        )
    if len(dims) == 4 and None in dims[2:]:
        raise ConversionError(f"{source.path} leaves height and width open; say them with --size HEIGHT,WIDTH")
    if len(dims) == 3 and dims[2] is None:
        raise ConversionError(f"{source.path} leaves the length of its signals open; export the model for one length")
    return tuple(size for size in dims[1:] if size is not None)
