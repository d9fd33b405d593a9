"""Accuracy of a .tflite classifier, where a TFLite interpreter is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.reading import read_network
from lorac_runtime import manifest as mf
from lorac_runtime.data import load_data
from lorac_runtime.errors import ConversionError

BATCH = 64


def accuracy(model: Path, artifact: Path, data: Path) -> float | None:
    """Share of the images of ``data`` that ``model`` names rightly; None without an interpreter.

    Raises ArtifactError or DataError for files that cannot be used.
    """
    manifest = mf.load(artifact)
    local = load_data(data, manifest.input, manifest.output.classes, manifest.class_names)
    try:
        answers = TfliteAnswers(model, read_network(model), manifest.input)
    except ConversionError:
        return None
    right, labels = 0, local.known_labels()
    for start in range(0, len(local), BATCH):
        (logits,) = answers(local.images[start : start + BATCH]).values()
        right += int(np.sum(np.argmax(logits, axis=1) == labels[start : start + BATCH]))
    return right / len(local)
