"""Which engines an artifact is for, and their files.

A step graph of plain operators trains wherever onnxruntime runs, so ``auto`` writes files for `onnxruntime` alone, and
for onnxruntime-training only where the model has an operator that just that engine can differentiate.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorac_exporters import preflight, training_ort, training_step
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.graphs import Graphs
from lorac_exporters.rewrites import rewrite_for_training
from lorac_exporters.training_step import StepConfig
from lorac_runtime.manifest import EngineEntry, TrainingDefaults

Floats = npt.NDArray[np.float32]
EngineChoice = Literal["auto", "onnxruntime", "onnxruntime-training", "both"]
ENGINE_CHOICES: tuple[EngineChoice, ...] = ("auto", "onnxruntime", "onnxruntime-training", "both")
_STEP, _TRAINING = training_step.ENGINE, training_ort.ENGINE


def chosen(choice: EngineChoice, graphs: Graphs, training: TrainingDefaults) -> tuple[str, ...]:
    """The engines that files are written for, the preferred one first.

    Raises ConversionError naming every node on a gradient path that the engine cannot differentiate.
    """
    if choice == "both":
        wanted: tuple[str, ...] = (_STEP, _TRAINING)
    elif choice != "auto":
        wanted = (choice,)
    else:
        other = obstacles(graphs, _STEP) and not obstacles(graphs, _TRAINING)
        wanted = (_TRAINING,) if other and not training_ort.optimizer_problems(training) else (_STEP,)
    for engine in wanted:
        preflight.require_none(obstacles(graphs, engine), engine=engine)
    return wanted


def option_problems(choice: EngineChoice, training: TrainingDefaults) -> list[str]:
    """Settings that an engine asked for cannot offer, a line each."""
    if choice not in ENGINE_CHOICES:
        return [f"engine {choice!r} is not one of {', '.join(ENGINE_CHOICES)}"]
    return training_ort.optimizer_problems(training) if choice in (_TRAINING, "both") else []


def obstacles(graphs: Graphs, engine: str) -> tuple[preflight.Problem, ...]:
    """Nodes on the gradient paths that ``engine`` cannot differentiate."""
    trained = graphs.trained.model.clone()
    rewrite_for_training(trained, keep=RULES if engine == _STEP else ())
    changing = [t.name for t in graphs.plan.trainables if t.role not in ("lora_a", "lora_b", "alpha")]
    changing += [a.weight for a in graphs.plan.adapters]
    return preflight.untrainable(trained, changing, engine=engine)


def write(engine: str, graphs: Graphs, folder: Path, *, start: Mapping[str, Floats], config: StepConfig) -> EngineEntry:
    """Write the files of an engine into ``folder``, which holds base.onnx.

    Raises ConversionError if the model cannot be trained, EngineError if a package that the export needs is missing.
    """
    if engine == _STEP:
        files = training_step.write(graphs, folder, start=start, config=config)
        return EngineEntry(files, importlib.metadata.version("lorac-deploy"))
    version = training_ort.write(
        graphs.training_model(dict(start)),
        folder,
        trainable=[t.name for t in graphs.plan.trainables],
        frozen=graphs.frozen_names(),
        defaults=config.training,
    )
    return EngineEntry(training_ort.FILES, version)
