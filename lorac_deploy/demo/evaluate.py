"""Accuracy of an ONNX classifier, in plain onnxruntime: `python evaluate.py MODEL MANIFEST_FOLDER DATA.npz`.

Run as a script by the device's Python, which has neither PyTorch nor this package: it needs `lorac_runtime`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from lorac_runtime import manifest as mf
from lorac_runtime.data import load_data, preprocess

BATCH = 64


def accuracy(model: Path, artifact: Path, data: Path) -> float:
    """Share of the images of ``data`` that ``model`` names rightly; ``artifact`` says what the model takes.

    Raises ArtifactError or DataError for files that cannot be used.
    """
    import onnxruntime

    manifest = mf.load(artifact)
    local = load_data(data, manifest.input, manifest.output.classes, manifest.class_names)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    right, labels = 0, local.known_labels()
    for start in range(0, len(local), BATCH):
        images = preprocess(local.images[start : start + BATCH], manifest.input)
        (logits,) = session.run([manifest.output.name], {manifest.input.name: images})
        right += int(np.sum(np.argmax(logits, axis=1) == labels[start : start + BATCH]))
    return right / len(local)


if __name__ == "__main__":
    print(accuracy(*(Path(argument) for argument in sys.argv[1:4])))
