"""Worker: what a model file answers to an image. ``python -m benchmarks.export_answers FILE IMAGE.npy``.

The image is (1, C, H, W) in float32; a file that wants the channels last gets them so. Prints the logits as JSON. The
ending of the file's name says which runtime opens it: onnxruntime, ai-edge-litert, or ExecuTorch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.step_protocol import own_stdout

Image = npt.NDArray[np.float32]


def by_onnxruntime(file: Path, image: Image) -> list[float]:
    """Logits of an .onnx file."""
    from lorac_runtime.engines import wheel  # imports onnxruntime without torch

    session = wheel.load_inference().InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image})
    return _flat(logits)


def by_litert(file: Path, image: Image) -> list[float]:
    """Logits of a .tflite file."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()
    fed = image if tuple(given["shape"]) == image.shape else image.transpose(0, 2, 3, 1)
    interpreter.set_tensor(given["index"], np.ascontiguousarray(fed, given["dtype"]))
    interpreter.invoke()
    return _flat(interpreter.get_tensor(found["index"]))


def by_executorch(file: Path, image: Image) -> list[float]:
    """Logits of a .pte file."""
    import torch
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    method = Runtime.get().load_program(str(file)).load_method("forward")
    return _flat(method.execute([torch.from_numpy(image)])[0].numpy())


def _flat(logits: Any) -> list[float]:
    numbers: list[float] = np.asarray(logits, np.float64).ravel().tolist()
    return numbers


BY_ENDING = {".onnx": by_onnxruntime, ".tflite": by_litert, ".pte": by_executorch}


def main(file: Path, image: Path) -> int:
    """Print the answer."""
    out = own_stdout()
    print(json.dumps(BY_ENDING[file.suffix](file, np.load(image))), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
