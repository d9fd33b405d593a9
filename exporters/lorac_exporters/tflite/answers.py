"""A .tflite file as a function from raw images to its outputs in real numbers, whatever types it takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_exporters.tflite.network import Network, Quantization, Tensor
from lorac_exporters.tflite.running import Runner
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import InputSpec

Array = npt.NDArray[Any]
Images = npt.NDArray[Any]  # raw: uint8 images (n, height, width, channels), or float32 signals (n, ...)


class TfliteAnswers:
    """Call it with raw images or signals (n, ...): returns each output, float32, by its signature name.

    Raises ConversionError if no TFLite runtime is installed, ArtifactError if it refuses the file.
    """

    def __init__(self, path: Path, network: Network, spec: InputSpec) -> None:
        """``network`` is what `schema.from_bytes` read from ``path``; ``spec`` describes the model it was made from."""
        if len(network.inputs) != 1:
            raise ArtifactError(f"{path} has {len(network.inputs)} inputs, expected one: the images")
        self._runner = Runner(path)
        self._input, self._outputs, self._spec = network.inputs[0], network.outputs, spec
        self._names = network.output_keys or tuple(tensor.name for tensor in network.outputs)

    def __call__(self, images: Images) -> dict[str, npt.NDArray[np.float32]]:
        """The outputs for raw images."""
        stored = model_input(images, self._input, self._spec)
        answers = self._runner.run(stored) if self._input.batch_axis == 0 else self._one_by_one(stored)
        return {
            name: real_values(answer, tensor.quantization)
            for name, answer, tensor in zip(self._names, answers, self._outputs, strict=True)
        }

    def _one_by_one(self, stored: Array) -> list[Array]:
        """For somebody else's file, which may take one image at a time."""
        rows = [self._runner.run(stored[i : i + 1]) for i in range(len(stored))]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]


def model_input(images: Images, tensor: Tensor, spec: InputSpec) -> Array:
    """Raw images (n, height, width, channels) in the form that a file with this input ``tensor`` takes.

    uint8: as they are, the file normalises them. float32: normalised. int8: that, quantized. Signals (n, channels,
    length) turn to channels last, too.

    >>> spec = InputSpec("x", (1, 1, 1), scale=0.5, mean=(1.0,), std=(2.0,))
    >>> model_input(np.array([[[[10]]]], np.uint8), Tensor("x", (1, 1, 1, 1)), spec)
    array([[[[2.]]]], dtype=float32)
    """
    if tensor.dtype == "uint8":
        return images
    values = preprocess(images, spec)
    values = values if spec.in_graph else np.moveaxis(values, 1, -1)
    if tensor.quantization is None:
        return np.ascontiguousarray(values, np.float32)
    return quantized(values, tensor.quantization)


def quantized(values: Array, how: Quantization) -> npt.NDArray[np.int8]:
    """Real numbers as int8, those out of range as the nearest that there is."""
    stored = np.rint(values / how.scale[0]) + how.zero_point[0]
    return np.ascontiguousarray(np.clip(stored, -128, 127), np.int8)


def real_values(answer: Array, how: Quantization | None) -> npt.NDArray[np.float32]:
    """What stored numbers stand for.

    >>> real_values(np.array([3], np.int8), Quantization(np.array([0.5], np.float32), np.array([1])))
    array([1.], dtype=float32)
    """
    if how is None:
        return np.asarray(answer, np.float32)
    return np.asarray((answer.astype(np.float32) - np.float32(how.zero_point[0])) * how.scale[0], np.float32)
