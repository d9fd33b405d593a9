"""Worker: convert a network with another converter, in that converter's own environment, and say how long it took.

``litert-torch`` reads a program saved by torch.export, ``onnx2tf`` an ONNX file. One conversion a process: what is
counted is the converter's own call, its imports apart; and the peak of memory of all of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_protocol import own_stdout, peak_bytes
from lorac_deploy.bench.environment import environment

SAMPLES = "calibration_image_sample_data_20x128x128x3_float32.npy"  # the name under which onnx2tf looks for images


def by_litert_torch(source: Path, target: Path) -> float:
    """Convert a saved torch.export program; seconds of the conversion."""
    import litert_torch  # type: ignore[import-not-found]  # lives in an environment of its own
    import torch

    program: Any = torch.export.load(source)
    arguments, _ = program.example_inputs
    started = time.perf_counter()
    litert_torch.convert(program.module(check_guards=False), arguments).export(str(target))
    return time.perf_counter() - started


def by_onnx2tf(source: Path, target: Path) -> float:
    """Convert an ONNX file of torch.onnx; seconds of the conversion. Random images lie where it would fetch some."""
    import onnx2tf  # type: ignore[import-not-found]  # lives in an environment of its own

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        np.save(SAMPLES, np.random.default_rng(0).random((20, 128, 128, 3), dtype=np.float32))
        started = time.perf_counter()
        onnx2tf.convert(
            input_onnx_file_path=str(source),
            output_folder_path=folder,
            non_verbose=True,
            batch_size=1,
        )
        seconds = time.perf_counter() - started
        (found,) = Path(folder).glob("*_float32.tflite")
        shutil.copyfile(found, target)
    return seconds


CONVERTERS = {"litert-torch": by_litert_torch, "onnx2tf": by_onnx2tf}


def main() -> int:
    """``python -m benchmarks.tflite_convert NAME SOURCE TARGET``; prints one line of JSON."""
    out = own_stdout()
    name, source, target = sys.argv[1:]
    started = time.perf_counter()
    seconds = CONVERTERS[name](Path(source).resolve(), Path(target).resolve())
    whole = time.perf_counter() - started
    answer = {"seconds": seconds, "whole_seconds": whole, "peak_bytes": peak_bytes(), "environment": environment()}
    print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
