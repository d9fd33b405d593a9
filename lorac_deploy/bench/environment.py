"""The machine and the packages that a figure was measured with; every benchmark's JSON carries it.

Needs the standard library alone, so that ``python environment.py`` can describe any environment: it prints JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

PACKAGES = (
    *("numpy", "torch", "onnx", "onnxruntime-training-cpu", "onnxruntime", "onnxsim", "safetensors", "executorch"),
    *("lorac-runtime", "tflite-runtime", "ai-edge-litert", "litert-torch", "onnx2tf", "tensorflow"),
)
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
TICKS = Path("/proc/stat")  # of all cores since the system started
STEAL, OVERALL = 7, 8  # the column of time that other guests of the host took; the first eight add up to all


def environment() -> dict[str, object]:
    """Processor, cores, governor, load, memory, Python and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable cores": usable_cores(),
        "governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else "not readable",
        "load": os.getloadavg(),
        "memory": _memory(),
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def ticks() -> tuple[int, int]:
    """(time stolen by other guests of the host, all time), in ticks of all cores; zeros where the system is silent."""
    if not TICKS.exists():
        return 0, 0
    columns = [int(text) for text in TICKS.read_text().splitlines()[0].split()[1:]]
    return columns[STEAL], sum(columns[:OVERALL])


def _memory() -> int | None:
    """Bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


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


if __name__ == "__main__":
    print(json.dumps(environment()))
