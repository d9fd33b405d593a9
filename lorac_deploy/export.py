"""`export_training_artifact`: from a checkpoint or any ONNX CNN to the folder that a device trains with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from lorac_deploy.checkpoint import load_checkpoint
from lorac_exporters.artifact import ArtifactConfig, ExportReport, check_replaceable, write_artifact
from lorac_exporters.graph_tools import static_dims
from lorac_exporters.heads import find_head, replace_head
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.torch_graph import export_graph
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
    on_progress: Callable[[str], None] = log.info,
) -> ExportReport:
    """Write a training artifact into the folder ``out``.

    ``source`` is a checkpoint folder (`lorac-deploy train`) or an `OnnxSource`. ``adapter`` starts the device
    from an adapter trained in PyTorch. ``input_uint8`` puts normalisation into the graph, which then takes raw
    uint8 images, (N, H, W, C).

    Raises ConversionError, CheckpointError, AdapterError, OutputError; see `lorac_runtime.errors`.

    >>> from lorac_deploy import ArtifactConfig, LoraConfig, export_training_artifact
    >>> config = ArtifactConfig(lora=LoraConfig(rank=4))
    >>> report = export_training_artifact(Path("base"), Path("artifact"), config=config)  # doctest: +SKIP
    """
    check_replaceable(out)
    config = config or ArtifactConfig()
    model, name, spec, names = (
        _from_onnx(source, config.lora.seed) if isinstance(source, OnnxSource) else _from_checkpoint(source)
    )
    spec = dataclasses.replace(spec, in_graph=input_uint8)
    return write_artifact(
        model,
        out,
        name=name,
        spec=spec,
        class_names=names,
        config=config,
        adapter=adapter,
        on_progress=on_progress,
    )


def _from_checkpoint(folder: Path) -> tuple[ir.Model, str, InputSpec, tuple[str, ...]]:
    checkpoint = load_checkpoint(folder)
    graph = export_graph(checkpoint.module, checkpoint.input.shape)
    return graph, checkpoint.spec.name, checkpoint.input, checkpoint.class_names


def _from_onnx(source: OnnxSource, seed: int) -> tuple[ir.Model, str, InputSpec, tuple[str, ...]]:
    model = read_graph(source.path)
    spec = InputSpec(
        name=str(model.graph.inputs[0].name),
        shape=_input_shape(model, source),
        scale=source.scale,
        mean=source.mean,
        std=source.std,
    )
    if len(spec.mean) != spec.shape[0] or len(spec.std) != spec.shape[0]:
        raise ConversionError(
            f"{source.path} takes {spec.shape[0]} channels, but mean has {len(spec.mean)} values and std "
            f"{len(spec.std)}; give one value per channel"
        )
    width = find_head(model).classes
    classes = width if source.num_classes is None else source.num_classes
    if classes != width:
        replace_head(model, classes, seed=seed)
    return model, source.path.stem, spec, _class_names(source, classes)


def _class_names(source: OnnxSource, classes: int) -> tuple[str, ...]:
    names = source.class_names or tuple(str(i) for i in range(classes))
    if len(names) != classes:
        raise ConversionError(f"{len(names)} class names were given for {classes} classes")
    return names


def _input_shape(model: ir.Model, source: OnnxSource) -> tuple[int, int, int]:
    dims = static_dims(model.graph.inputs[0])
    if dims is None or len(dims) != 4 or dims[1] is None:
        raise ConversionError(f"{source.path}: input must be (batch, channels, height, width), the file says {dims}")
    height, width = source.size or (dims[2], dims[3])
    if height is None or width is None:
        raise ConversionError(f"{source.path} leaves height and width open; say them with --size HEIGHT,WIDTH")
    if source.size and any(d not in (None, s) for d, s in zip(dims[2:], source.size, strict=True)):
        raise ConversionError(f"{source.path} takes {dims[2]} x {dims[3]} images, --size says {height} x {width}")
    return dims[1], height, width
