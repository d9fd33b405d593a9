"""Write a training artifact: base.onnx, base.tflite, what trains them, and the manifest that ties them together.

The folder is made beside its final place, checked, and renamed; an export that fails leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import safetensors.numpy

from lorac_exporters import engine_files
from lorac_exporters.artifact_config import ArtifactConfig as ArtifactConfig
from lorac_exporters.artifact_folder import beside, check_replaceable
from lorac_exporters.base_tflite import TfliteBase, write_base
from lorac_exporters.bn_tensors import batchnorm_tensors
from lorac_exporters.branches import form_of
from lorac_exporters.engine_files import chosen
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.inject import count_parameters, starting_values
from lorac_exporters.memory_needs import memory_needs
from lorac_exporters.methods.paca import partial_metadata
from lorac_exporters.patch_table import patch_table
from lorac_exporters.prefix import read_features
from lorac_exporters.statistics_graph import statistics_graph
from lorac_exporters.tflite.export import TfliteReport
from lorac_exporters.training_step import StepConfig
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import check_adapter, load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.data import LocalData
from lorac_runtime.delta import resolve_rank_mode
from lorac_runtime.errors import AdapterError
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.version import __version__

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]
Progress = Callable[[str], None]
STATISTICS = "stats_model.onnx"
LOGITS_TOLERANCE = 1e-4  # times max(1, largest logit)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written: the manifest, what canonicalization changed, which layers stay frozen and why.

    ``tflite`` tells of base.tflite; where there is none it is None, and ``no_tflite`` says why.
    """

    folder: Path
    manifest: mf.Manifest
    changes: tuple[str, ...]
    frozen: tuple[tuple[str, str], ...]
    seconds: float
    tflite: TfliteReport | None = None
    no_tflite: str = ""


def write_artifact(
    model: ir.Model,
    out: Path,
    *,
    name: str,
    spec: mf.InputSpec,
    class_names: tuple[str, ...],
    config: ArtifactConfig,
    new_head: bool = False,
    adapter: Path | None = None,
    calibration: npt.NDArray[Any] | None = None,
    anchors: LocalData | None = None,
    on_progress: Progress = log.info,
) -> ExportReport:
    """Write the artifact of an inference graph into the folder ``out``.

    ``model`` is a raw graph (`torch_graph.export_graph` or `onnx_file.read_graph`). ``new_head`` gives it a fresh
    classifier for ``class_names``; otherwise its own must have as many outputs. ``adapter`` starts the device from an
    adapter trained elsewhere. ``calibration``: raw images (N, H, W, C) or signals (N, ...), from which an
    int8 base.tflite takes its ranges. ``anchors`` are samples with labels that no adaptation on a device may forget.

    Raises ConversionError for a model that cannot be trained (every obstacle named), or not be written to TFLite as
    asked, AdapterError for an adapter of another model, OutputError if the folder cannot be written or holds something
    else.
    """
    check_replaceable(out)
    on_progress("cleaning the graph and planning what trains")
    graphs = build_graphs(
        model,
        spec=spec,
        classes=len(class_names),
        new_head=new_head,
        method=config.method,
        lora=config.lora,
        policy=config.policy,
        task=config.task,
    )
    parameters = count_parameters(graphs.original)
    naming = Naming(name, class_names, parameters)
    return write_graphs(
        graphs,
        out,
        naming=naming,
        config=config,
        adapter=adapter,
        calibration=calibration,
        anchors=anchors,
        on_progress=on_progress,
    )


@dataclasses.dataclass(frozen=True)
class Naming:
    """What a manifest says of its network beside the graphs; ``parameters`` counts those of the original."""

    model: str
    class_names: tuple[str, ...]
    parameters: int


def write_graphs(
    graphs: Graphs,
    out: Path,
    *,
    naming: Naming,
    config: ArtifactConfig,
    adapter: Path | None = None,
    calibration: npt.NDArray[Any] | None = None,
    anchors: LocalData | None = None,
    on_progress: Progress = log.info,
) -> ExportReport:
    """Write the artifact of planned graphs; `write_artifact` makes them from a raw one. Raises what that raises."""
    started = time.perf_counter()
    check_replaceable(out)
    engines = chosen(config.engine, graphs, config.settings)
    with beside(out) as folder:
        on_progress("writing base.onnx")
        ir.save(graphs.base.model, folder / mf.BASE)
        on_progress(f"writing {mf.BASE_TFLITE}")
        lite = write_base(
            config.tflite, graphs, folder, name=naming.model, class_names=naming.class_names, images=calibration
        )
        if anchors is not None:
            arrays: dict[str, Any] = {graphs.spec.key: anchors.images, "labels": anchors.known_labels()}
            np.savez_compressed(folder / mf.ANCHORS, **arrays)
        if graphs.purpose is not None and graphs.purpose.loss is not None:
            ir.save(graphs.purpose.loss, folder / mf.LOSS)
        manifest = _manifest(folder, graphs, lite, naming, config)
        entries = _write_training(folder, graphs, engines, manifest, config, adapter, on_progress)
        manifest = _finished(folder, manifest, entries)
        (folder / mf.FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        mf.verify_files(folder, mf.load(folder))
    seconds = time.perf_counter() - started
    return ExportReport(out, manifest, graphs.base.changes, graphs.plan.frozen, seconds, lite.report, lite.reason)


def _write_training(
    folder: Path,
    graphs: Graphs,
    engines: tuple[str, ...],
    manifest: mf.Manifest,
    config: ArtifactConfig,
    adapter: Path | None,
    on_progress: Progress,
) -> dict[str, mf.EngineEntry]:
    """The starting state, and the files of each engine."""
    tensors = _write_batchnorm(folder, graphs)
    start = starting_values(graphs.plan, graphs.trained.values, seed=config.lora.seed) | graphs.statistics()
    if adapter is not None:
        start |= _from_adapter(manifest, adapter, tensors)
    mode = resolve_rank_mode(config.lora.rank_mode, graphs.network.backbone_parameters)
    metadata = adapter_metadata(manifest, blocks=config.lora.blocks, rank_mode=mode)
    save_adapter(folder / mf.ADAPTER, start, metadata | partial_metadata(manifest.partials, config.lora))
    steps = StepConfig(config.settings, form_of(config.form, config.settings.batch_size))
    entries = {}
    for engine in engines:
        on_progress(f"building the gradient graph for {engine}")
        entries[engine] = engine_files.write(engine, graphs, folder, start=start, config=steps)
    return entries


def _manifest(folder: Path, graphs: Graphs, lite: TfliteBase, naming: Naming, config: ArtifactConfig) -> mf.Manifest:
    base = folder / mf.BASE
    return mf.Manifest(
        schema_version=mf.SCHEMA_VERSION,
        model=naming.model,
        method=config.method,
        bn_policy=config.policy,
        coordinates="unfolded" if graphs.live else "folded",
        input=dataclasses.replace(graphs.spec, name=str(graphs.base.model.graph.inputs[0].name)),
        output=mf.OutputSpec(str(graphs.base.model.graph.outputs[0].name), len(naming.class_names)),
        task=None if graphs.purpose is None else graphs.purpose.task,
        class_names=naming.class_names,
        adapters=graphs.plan.adapters,
        partials=graphs.plan.partials,
        additions=graphs.additions,
        trainables=graphs.plan.trainables,
        batchnorms=graphs.base.batchnorms,
        training=config.settings,
        files={mf.BASE: mf.FileEntry(mf.sha256(base), base.stat().st_size)},
        patches=(*patch_table(base, mf.BASE, lite.shapes), *lite.patches),
        tolerances={"logits": LOGITS_TOLERANCE},
        engines={},
        model_parameters=naming.parameters,
        versions={"lorac-deploy": __version__, **{p: importlib.metadata.version(p) for p in ("onnx", "onnx-ir")}},
        tflite=lite.entry,
    )


def _finished(folder: Path, manifest: mf.Manifest, engines: dict[str, mf.EngineEntry]) -> mf.Manifest:
    """Add the files, the engines and the features of a frozen front to the manifest."""
    extra = tuple(n for n in (STATISTICS,) if (folder / n).exists())
    engines = {name: dataclasses.replace(entry, files=(*entry.files, *extra)) for name, entry in engines.items()}
    entries = {path.name: mf.FileEntry(mf.sha256(path), path.stat().st_size) for path in sorted(folder.iterdir())}
    finished = dataclasses.replace(manifest, files=entries, engines=engines, features=read_features(folder))
    return dataclasses.replace(finished, memory=memory_needs(folder, finished))


def _write_batchnorm(folder: Path, graphs: Graphs) -> dict[str, npt.NDArray[np.generic]]:
    if not graphs.base.batchnorms:
        return {}
    known = graphs.norms
    tensors = batchnorm_tensors(graphs.base.batchnorms, graphs.original.values) if known is None else dict(known)
    safetensors.numpy.save_file(tensors, folder / mf.BATCHNORM)
    if graphs.policy == "recalibrate":
        statistics = statistics_graph(graphs.original.model, graphs.base.batchnorms)
        ir.save(statistics, folder / STATISTICS)
    return tensors


def _from_adapter(
    manifest: mf.Manifest, path: Path, batchnorm: dict[str, npt.NDArray[np.generic]]
) -> dict[str, Floats]:
    if manifest.bn_policy == "recalibrate":
        raise AdapterError(
            f"{path}: an artifact with BN policy recalibrate re-estimates its statistics before it trains and "
            "cannot start from an adapter; export it with --bn frozen, or without --adapter"
        )
    file = load_adapter(path)
    check_adapter(manifest, file)
    return to_manifest_coordinates(manifest, batchnorm, file)


def adapter_metadata(
    manifest: mf.Manifest, *, blocks: tuple[str, ...] = (), rank_mode: Literal["rk", "r"] | None = None
) -> dict[str, str]:
    """The metadata of an adapter file that belongs to this artifact's base; all values are text.

    ``rank_mode`` None is the one that the adapters' ranks show; those of layers with a single tap show none.
    """
    shown = "rk" if any(a.rank > a.r for a in manifest.adapters) else "r"
    fixed = fixed_tensors(manifest.adapters, manifest.trainables)
    first = manifest.adapters[0] if manifest.adapters else None
    return {
        "format": "lorac-adapter",
        "schema": "1",
        "model": manifest.model,
        "method": manifest.method,
        "layout": first.layout if first else "",
        "r": str(first.r) if first else "",
        "rank_mode": (rank_mode or shown) if first else "",
        "alpha": repr(first.alpha) if first else "",
        "freeze_a": "true" if fixed else "false",
        "blocks": ",".join(blocks),
        "bn_policy": manifest.bn_policy,
        "coordinates": manifest.coordinates,
        "base_sha256": manifest.files[mf.BASE].sha256,
        "producer": f"lorac-deploy {__version__}",
        **({} if manifest.additions is None else manifest.additions.settings),
    }
