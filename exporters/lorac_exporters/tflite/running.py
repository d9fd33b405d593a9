"""Run a .tflite file in this process, for verifying it and for calibration."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_exporters.tflite.schema import from_bytes
from lorac_runtime.errors import ArtifactError, ConversionError, DataError

Array = npt.NDArray[Any]
_RUNTIMES = ("ai_edge_litert", "tflite_runtime")


class Runner:
    """A .tflite file, given as a path or as its bytes, ready to run on ``threads`` threads.

    The file is read by this package first, because tflite-runtime 2.14.0 dies of a file that is cut short.

    Raises ConversionError if no TFLite runtime is installed, ArtifactError if the file is missing or damaged, or if
    the runtime refuses it.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        self.threads = threads
        self.where = str(model) if isinstance(model, Path) else "the model"
        self._module = _runtime()
        from_bytes(_content(model), self.where)
        self._model = {"model_path": str(model)} if isinstance(model, Path) else {"model_content": model}
        self._interpreter = self._opened()
        self._preserving: Any = None

    def run(self, *inputs: Array) -> list[Array]:
        """The outputs for inputs of any batch size, in the order of the file.

        Raises DataError if the number, dtype or shape of the inputs is not the file's.
        """
        self._compute(self._interpreter, inputs)
        details = self._interpreter.get_output_details()
        return [self._interpreter.get_tensor(detail["index"]) for detail in details]

    def tensors(self, *inputs: Array) -> dict[str, Array]:
        """Every tensor by its name, computed with TFLite's plain kernels: XNNPACK keeps no intermediate values."""
        if self._preserving is None:
            plain = self._module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            options = {"experimental_preserve_all_tensors": True, "experimental_op_resolver_type": plain}
            self._preserving = self._opened(**options)
        interpreter = self._preserving
        self._compute(interpreter, inputs)
        return {d["name"]: interpreter.get_tensor(d["index"]) for d in interpreter.get_tensor_details() if d["name"]}

    def _opened(self, **options: Any) -> Any:
        try:
            return self._module.Interpreter(num_threads=self.threads, **self._model, **options)
        except (ValueError, RuntimeError) as err:
            raise ArtifactError(f"{self._module.__package__} cannot load {self.where}: {err}") from err

    def _compute(self, interpreter: Any, inputs: tuple[Array, ...]) -> None:
        details = interpreter.get_input_details()
        if len(details) != len(inputs):
            raise DataError(f"{self.where} has {len(details)} inputs, {len(inputs)} were given")
        for detail, array in zip(details, inputs, strict=True):
            _check(self.where, detail, array)
            if tuple(detail["shape"]) != array.shape:
                interpreter.resize_tensor_input(detail["index"], array.shape)
        try:
            interpreter.allocate_tensors()
            for detail, array in zip(details, inputs, strict=True):
                interpreter.set_tensor(detail["index"], array)
            interpreter.invoke()
        except (ValueError, RuntimeError) as err:
            raise ArtifactError(f"{self._module.__package__} cannot run {self.where}: {err}") from err


def _check(where: str, detail: dict[str, Any], array: Array) -> None:
    """Raises DataError unless dtype and shape are the file's, the batch apart."""
    signature = [int(size) for size in detail["shape_signature"]]
    expected = signature or [int(size) for size in detail["shape"]]
    fits = len(expected) == array.ndim and all(e in (-1, s) for e, s in zip(expected, array.shape, strict=True))
    if not fits or array.dtype != np.dtype(detail["dtype"]):
        wanted = f"{np.dtype(detail['dtype'])} {tuple(expected)}"
        raise DataError(f"input {detail['name']!r} of {where} is {wanted}, {array.dtype} {array.shape} was given")


def _content(model: Path | bytes) -> bytes:
    if isinstance(model, bytes):
        return model
    try:
        return model.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{model} cannot be read: {err.strerror}") from err


def _runtime() -> Any:
    for name in _RUNTIMES:
        try:
            return importlib.import_module(f"{name}.interpreter")
        except ModuleNotFoundError as err:
            if err.name is None or err.name.split(".")[0] != name:
                raise
    raise ConversionError(
        "running a .tflite file needs a TFLite runtime, and none is installed: pip install 'lorac-deploy[tflite]'"
    )
