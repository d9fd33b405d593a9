"""The environment a figure was measured in; every benchmark's JSON carries it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    *("numpy", "torch", "onnx", "onnxruntime-training-cpu", "onnxruntime", "onnxsim", "safetensors"),
    *("tflite-runtime", "ai-edge-litert", "litert-torch", "onnx2tf", "tensorflow"),
)


def environment() -> dict[str, object]:
    """Processor, cores, load, Python and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
