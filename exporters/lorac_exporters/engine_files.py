"""Which engines an artifact is for, and their files.

A step graph of plain operators trains wherever onnxruntime runs, so ``auto`` writes files for `onnxruntime` alone, and
for onnxruntime-training only where the model has an operator that just that engine can differentiate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorac_exporters import preflight, training_ort, training_step
from lorac_exporters.choices import EngineChoice as EngineChoice
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.graphs import Graphs
from lorac_exporters.rewrites import rewrite_for_training
from lorac_exporters.training_step import StepConfig
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import EngineEntry, TrainingDefaults
from lorac_runtime.version import __version__

Floats = npt.NDArray[np.float32]
_STEP, _TRAINING = training_step.ENGINE, training_ort.ENGINE


def chosen(choice: EngineChoice, graphs: Graphs, training: TrainingDefaults) -> tuple[str, ...]:
    """The engines that files are written for, the preferred one first.

    Raises ConversionError naming every node on a gradient path that the engine cannot differentiate, or for an engine
    that cannot do without training where nothing trains.
    """
    if choice == "both":
        wanted: tuple[str, ...] = (_STEP, _TRAINING)
    elif choice != "auto":
        wanted = (choice,)
    else:
        classifier = graphs.purpose is None  # the other engine has no other loss
        other = classifier and obstacles(graphs, _STEP) and not obstacles(graphs, _TRAINING)
        wanted = (_TRAINING,) if other and not training_ort.optimizer_problems(training) else (_STEP,)
    if _TRAINING in wanted and not graphs.plan.trainables:
        raise ConversionError(
            f"method {graphs.plan.method} trains nothing, and the engine {_TRAINING} has no graphs without training: "
            f"export for {_STEP}, which runs beside the training build too"
        )
    for engine in wanted:
        preflight.require_none(obstacles(graphs, engine), engine=engine)
    return wanted


def obstacles(graphs: Graphs, engine: str) -> tuple[preflight.Problem, ...]:
    """Nodes on the gradient paths that ``engine`` cannot differentiate."""
    trained = graphs.trained.model.clone()
    rewrite_for_training(trained, keep=RULES if engine == _STEP else ())
    changing = [t.name for t in graphs.plan.trainables if t.role not in ("lora_a", "lora_b", "alpha", "partial")]
    return preflight.untrainable(trained, [*changing, *graphs.plan.updated], engine=engine)


def write(engine: str, graphs: Graphs, folder: Path, *, start: Mapping[str, Floats], config: StepConfig) -> EngineEntry:
    """Write the files of an engine into ``folder``, which holds base.onnx.

    Raises ConversionError if the model cannot be trained, EngineError if a package that the export needs is missing.
    """
    if engine == _STEP:
        files = training_step.write(graphs, folder, start=start, config=config)
        return EngineEntry(files, __version__)
    version = training_ort.write(
        graphs.training_model(dict(start)),
        folder,
        trainable=[t.name for t in graphs.plan.trainables],
        frozen=graphs.frozen_names(),
        defaults=config.training,
    )
    return EngineEntry(training_ort.FILES, version)
