"""Worker: convert a network with another converter, in that converter's own environment, and say how long it took.

``litert-torch`` and ``executorch`` read a program saved by torch.export, ``onnx2tf`` and ``onnxsim`` an ONNX file. One
conversion a process: what is counted is the converter's own call up to the file on disk, its imports apart; and the
peak of memory of all of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_protocol import own_stdout, peak_bytes
from lorac_deploy.bench.environment import environment

SAMPLES = "calibration_image_sample_data_20x128x128x3_float32.npy"  # the name under which onnx2tf looks for images


class Call:
    """A converter's own call, as a ``with`` block: its seconds, and the peak of memory before it."""

    def __enter__(self) -> Call:
        self.imported_bytes = peak_bytes()
        self._started = time.perf_counter()
        self.seconds = 0.0
        self.stages: dict[str, float] = {}
        return self

    def stage(self, name: str) -> None:
        """A part of it ends here."""
        self.stages[name] = time.perf_counter() - self._started - sum(self.stages.values())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


Converter = Callable[[Path, Path], Call]  # source, target


def by_litert_torch(source: Path, target: Path) -> Call:
    """Convert a saved torch.export program."""
    import litert_torch  # type: ignore[import-not-found]  # lives in an environment of its own
    import torch

    program: Any = torch.export.load(source)
    arguments, _ = program.example_inputs
    module = program.module(check_guards=False)
    with Call() as call:
        litert_torch.convert(module, arguments).export(str(target))
    return call


def by_executorch(source: Path, target: Path) -> Call:
    """Lower a saved torch.export program to XNNPACK and write a .pte file."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # type: ignore[import-not-found]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    program: Any = torch.export.load(source)
    arguments, _ = program.example_inputs
    module = program.module(check_guards=False)
    with Call() as call:
        exported = torch.export.export(module, arguments)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        target.write_bytes(lowered.to_executorch().buffer)
    return call


def by_onnx2tf(source: Path, target: Path) -> Call:
    """Convert an ONNX file of torch.onnx. Random images lie where it would fetch some."""
    import onnx2tf  # type: ignore[import-not-found]  # lives in an environment of its own

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        np.save(SAMPLES, np.random.default_rng(0).random((20, 128, 128, 3), dtype=np.float32))
        with Call() as call:
            onnx2tf.convert(
                input_onnx_file_path=str(source),
                output_folder_path=folder,
                non_verbose=True,
                batch_size=1,
            )
        (found,) = Path(folder).glob("*_float32.tflite")
        shutil.copyfile(found, target)
    return call


def by_onnxsim(source: Path, target: Path) -> Call:
    """Simplify an ONNX file. Raises RuntimeError if onnxsim finds that its result is not equal."""
    import onnx
    import onnxsim  # type: ignore[import-not-found]  # lives in an environment of its own

    with Call() as call:
        simplified, sound = onnxsim.simplify(onnx.load(source))
        onnx.save(simplified, target)
    if not sound:
        raise RuntimeError(f"onnxsim says that its result for {source} is not equal")
    return call


CONVERTERS: dict[str, Converter] = {
    "litert-torch": by_litert_torch,
    "onnx2tf": by_onnx2tf,
    "executorch": by_executorch,
    "onnxsim": by_onnxsim,
}


def main(converters: Mapping[str, Converter] = CONVERTERS) -> int:
    """``python -m MODULE NAME SOURCE TARGET``; prints one line of JSON."""
    out = own_stdout()
    name, source, target = sys.argv[1:]
    started = time.perf_counter()
    call = converters[name](Path(source).resolve(), Path(target).resolve())
    answer = {
        "seconds": call.seconds,
        "stages": call.stages,
        "whole_seconds": time.perf_counter() - started,
        "imported_bytes": call.imported_bytes,
        "peak_bytes": peak_bytes(),
        "environment": environment(),
    }
    print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
