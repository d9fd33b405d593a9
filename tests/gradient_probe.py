"""A program: can onnxruntime-training differentiate these operators? Prints JSON, one line for each.

Its own process, because a gradient kernel that fails may end it. Each line holds the operator, the error (or null),
and the derivative of the loss along one direction of the first convolution's weight: as the engine computes it,
and by central differences of the original graph.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from exporter_graphs import image, outputs
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module
from operator_bodies import DIFFERENTIABLE, REFUSED, REWRITTEN, operator_model

from lorac_exporters.canonical import canonicalize
from lorac_exporters.rewrites import rewrite_for_training

LABELS = np.array([0, 1, 2, 3], np.int64)
STEP = 3e-4


def loss(logits: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float(-(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(4), LABELS].mean())


def differences(model: ir.Model, direction: np.ndarray) -> float:
    losses = []
    for sign in (1, -1):
        twin = model.clone()
        weight = twin.graph.initializers["w"]
        weight.const_value = ir.tensor(weight.const_value.numpy() + sign * STEP * direction, name="w")
        losses.append(loss(outputs(twin, image(4, 3, 8, 8))))
    return (losses[0] - losses[1]) / (2 * STEP)


def gradient(model: ir.Model, folder: Path) -> np.ndarray:
    artifacts.generate_artifacts(
        ir.to_proto(model),
        requires_grad=["w"],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=str(folder),
    )
    for path in folder.glob("*.onnx"):
        proto = onnx.load(path)
        proto.ir_version = 9
        onnx.save(proto, path)
    state = CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = Module(str(folder / "training_model.onnx"), state)
    module.train()
    module(image(4, 3, 8, 8), LABELS)
    return state.parameters["w"].grad


def probe(name: str, body: str) -> dict[str, object]:
    model = operator_model(body)
    direction = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    prepared = canonicalize(model).model if name not in KEPT_RAW else model
    if name in REWRITTEN and name not in RAW:
        rewrite_for_training(prepared)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = gradient(prepared, Path(folder))
        except RuntimeError as err:
            return {"name": name, "error": f"{type(err).__name__}: {err}"}
    return {
        "name": name,
        "error": None,
        "engine": float((found * direction).sum()),
        "differences": differences(model, direction),
    }


KEPT_RAW = {"Conv, SAME padding"}
RAW = set(sys.argv[2].split("|")) if len(sys.argv) > 2 else set()
BODIES = {
    **DIFFERENTIABLE,
    **REWRITTEN,
    **REFUSED,
    "Conv, SAME padding": 'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (c, k, v)',
}

if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(4)
    out = os.fdopen(os.dup(1), "w")  # the engine prints hundreds of lines itself
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for operator in sys.argv[1].split("|"):
        print(json.dumps(probe(operator, BODIES[operator])), file=out, flush=True)
