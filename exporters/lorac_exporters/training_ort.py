"""The artifact of the engine ``onnxruntime-training``: training, eval and optimizer graphs, and a checkpoint.

The four files load in onnxruntime-training's own API (`CheckpointState`, `Module`, `Optimizer`) as they are, so
that C++, Java and Swift apps can use them too. Gradients are built by onnxruntime-training 1.19.2 itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lorac_runtime.errors import ConversionError, EngineError
from lorac_runtime.manifest import TrainingDefaults

log = logging.getLogger(__name__)

ENGINE = "onnxruntime-training"
GRAPHS = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")
CHECKPOINT = "checkpoint"
FILES = (*GRAPHS, CHECKPOINT)
IR_VERSION = 9  # 1.19.2 refuses what onnx >= 1.18 writes by itself; 9 is read by onnxruntime from 1.17 on


def write(model: ir.Model, folder: Path, *, trainable: list[str], frozen: list[str], defaults: TrainingDefaults) -> str:
    """Write the four files into ``folder``; returns the version of onnxruntime-training that made them.

    ``trainable`` and ``frozen`` name initializers of ``model``; both land in the checkpoint, the frozen ones so
    that a device can set them. All other initializers stay constants of the graphs.
    The training graph's inputs are the model's input and ``labels`` (int64); outputs are the loss and the logits.

    Raises ConversionError if the gradient graph cannot be built, EngineError if the package is missing.
    """
    artifacts, version = _import_artifacts()
    proto = _prepared(model)
    _restart_name_counter()
    try:
        with _quiet_native_log():
            artifacts.generate_artifacts(
                proto,
                requires_grad=trainable,
                frozen_params=frozen,
                loss=artifacts.LossType.CrossEntropyLoss,
                optimizer=_optimizer(defaults),
                artifact_directory=str(folder),
                additional_output_names=[proto.graph.output[0].name],
            )
    except RuntimeError as err:
        raise ConversionError(f"onnxruntime-training cannot build the gradient graph: {err}") from err
    for name in GRAPHS:
        _set_ir_version(folder / name)
    return version


def _prepared(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    proto.ir_version = IR_VERSION
    return proto


def _optimizer(defaults: TrainingDefaults) -> Any:
    """The optimizer block: clipping by global norm is part of its graph, the learning rate an input."""
    from onnxruntime.training import onnxblock

    clip = onnxblock.optim.ClipGradNorm(defaults.clip_norm) if defaults.clip_norm > 0 else None
    if defaults.optimizer == "adamw":
        return onnxblock.optim.AdamW(
            betas=defaults.betas, eps=defaults.eps, weight_decay=defaults.weight_decay, clip_grad=clip
        )
    return onnxblock.optim.SGD(clip_grad=clip)


def optimizer_problems(defaults: TrainingDefaults) -> list[str]:
    """Which settings of optimizer and loss this engine does not have, a line each.

    >>> optimizer_problems(TrainingDefaults(optimizer="sgd", weight_decay=0.1))
    ['onnxruntime-training has no weight_decay for sgd, got 0.1; leave it out, or use the engine onnxruntime']
    """
    missing = {"adamw": ("amsgrad",), "sgd": ("weight_decay", "momentum", "dampening", "nesterov")}
    given = [(n, getattr(defaults, n)) for n in missing.get(defaults.optimizer, ())]
    lacks = [f"no {name} for {defaults.optimizer}, got {value}; leave it out" for name, value in given if value]
    if defaults.loss != "cross_entropy":
        lacks.append(f"no loss {defaults.loss}; use cross_entropy")
    if defaults.label_smoothing:
        lacks.append(f"no label_smoothing, got {defaults.label_smoothing}; leave it out")
    return [f"{ENGINE} has {text}, or use the engine onnxruntime" for text in lacks]


def _restart_name_counter() -> None:
    """Names of added nodes carry a number that counts over the whole process; equal exports must give equal bytes."""
    from onnxruntime.training.onnxblock import _graph_utils

    _graph_utils._GRAPH_TOKEN = 0


def _set_ir_version(path: Path) -> None:
    proto = onnx.load(path)
    proto.ir_version = IR_VERSION
    onnx.save(proto, path)


def _import_artifacts() -> tuple[Any, str]:
    try:
        import onnxruntime
        from onnxruntime.training import artifacts
    except ImportError as err:
        raise EngineError(
            "exporting for the engine onnxruntime-training needs the package onnxruntime-training-cpu: "
            "pip install onnxruntime-training-cpu==1.19.2 (in an environment without plain onnxruntime)"
        ) from err
    return artifacts, str(onnxruntime.__version__)


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Keep hundreds of INFO lines of the native library out of the user's terminal.

    They ignore the severity setting and go straight to file descriptor 2; they are logged at DEBUG instead.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            sink.seek(0)
            log.debug("onnxruntime-training: %s", sink.read().decode(errors="replace"))
