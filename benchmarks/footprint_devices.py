"""Ways to equip a device, each as what one would install there and what a fine-tuning then imports."""

from __future__ import annotations

import dataclasses

from benchmarks import interpreters as envs

OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Device:
    """``roots`` are installed with all that they require; ``code`` is all that a process runs."""

    variant: str
    environment: str
    roots: tuple[str, ...]
    code: str
    note: str = ""


# Modules that the device runtime imports when it needs them are imported here as a fine-tuning would.
LAZY = "import numpy.ma, numpy.random; from lorac_runtime import cli; from lorac_runtime.engines import wheel; "
PLAIN = f"{LAZY}import lorac_runtime.engines.onnxruntime; wheel.load_inference()"
NATIVE = f"{LAZY}import lorac_runtime.engines.onnxruntime_training; wheel.load()"

DEVICES = (
    Device(OURS, envs.RUNTIME, ("lorac-runtime[onnxruntime]",), PLAIN),
    Device(
        "ours, training engine",
        envs.TRAINING,
        ("lorac-runtime[onnxruntime-training]",),
        NATIVE,
    ),
    Device(
        "PyTorch",
        envs.PYTORCH,
        ("torch", "numpy"),
        "import numpy, torch, torch._dynamo",  # the last one is imported by every optimizer
    ),
    Device(
        "onnxruntime-training alone",
        envs.PROJECT,  # the only one with torch beside it
        ("onnxruntime-training-cpu", "torch"),
        "import onnxruntime.training.api",
        "its imports need PyTorch, which it does not name as a requirement",
    ),
    Device(
        "ExecuTorch",
        envs.EXECUTORCH,
        ("executorch", "torch"),
        "import executorch.extension.training",
        "its Python packages, which need PyTorch; an app that is built with its C++ library is far smaller",
    ),
    Device(
        "ai-edge-litert",
        envs.LITERT,
        ("ai-edge-litert",),
        "import ai_edge_litert.interpreter",
        "runs .tflite files and cannot train",
    ),
)
