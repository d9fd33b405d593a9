"""Two steps of fine-tuning, fusing, and what the fused files answer: one JSON object, the same program everywhere.

python two_steps.py ARTIFACT DATA OUT
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np

from lorac_runtime import FinetuneConfig, finetune, load_manifest
from lorac_runtime.data import load_data, preprocess


def main() -> None:
    artifact, data, out = map(Path, sys.argv[1:])
    formats = ("onnx", "tflite")
    config = FinetuneConfig(epochs=1, batch_size=8, lr=0.05, val_fraction=0.2, threads=1, to=formats, restart=True)
    report = finetune(artifact, data, out, config)
    manifest = load_manifest(artifact)
    local = load_data(data, manifest.input, manifest.output.classes, manifest.class_names)
    images = np.asarray(preprocess(local.images[:2], manifest.input))
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "versions": {**report.versions, "ai-edge-litert": litert_version()},
                "loss_before": report.loss_before,
                "losses": report.losses,
                "loss_after": report.loss_after,
                "onnx": answers_of_onnx(out / "fused.onnx", manifest.input.name, images),
                "tflite": answers_of_tflite(out / "fused.tflite", images),
            }
        )
    )


def answers_of_onnx(path: Path, name: str, images: np.ndarray) -> list[list[float]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: images})[0].tolist()


def answers_of_tflite(path: Path, images: np.ndarray) -> list[list[float]]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    found = []
    for image in images.transpose(0, 2, 3, 1):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[np.newaxis])
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0].tolist())
    return found


def litert_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("ai-edge-litert")


if __name__ == "__main__":
    main()
