"""Import the training half of onnxruntime alone, without the frameworks that its package files pull in.

``import onnxruntime`` of the training wheel tries ``onnxruntime.training.ortmodule``, and that imports torch and
onnx wherever these are installed; so does ``import onnxruntime.training``. An empty stand-in for
``onnxruntime.training`` keeps both out: while onnxruntime loads it has no search path, afterwards the real one.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import sys
import types
from pathlib import Path
from typing import Any

from lorac_runtime.errors import EngineError

REQUIREMENT = "onnxruntime-training-cpu==1.19.2"
TRAINING = "onnxruntime.training"
FATAL = 4  # severity of the native log; errors reach the user as exceptions


@dataclasses.dataclass(frozen=True)
class Wheel:
    """The modules of the training wheel: ``ort`` for sessions, ``api`` for training."""

    ort: Any
    api: Any
    version: str


def load() -> Wheel:
    """Import the wheel (once; later calls are free).

    Raises EngineError with the pip command if it is missing, with the reason if another build is in its place.
    """
    folder = _package_folder()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the native library loads
    try:
        ort = _import_beside_stand_in(folder)
        api = importlib.import_module(f"{TRAINING}.api")
        native = importlib.import_module("onnxruntime.capi._pybind_state")
    except ImportError as err:
        raise EngineError(f"onnxruntime is installed in {folder} but does not load: {err}") from err
    if not hasattr(native, "CheckpointState"):
        raise EngineError(_wrong_build(folder))
    ort.set_default_logger_severity(FATAL)
    return Wheel(ort, api, str(ort.__version__))


def _package_folder() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(
            "the engine onnxruntime-training needs a package that is not installed here: "
            f"pip install {REQUIREMENT}{_why_pip_may_fail()}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "training" / "api").is_dir():
        raise EngineError(_wrong_build(folder))
    return folder


def _why_pip_may_fail() -> str:
    """A reason where this Python or processor is known to have no build, else nothing."""
    supported = sys.version_info < (3, 13) and platform.machine().lower() in ("x86_64", "amd64")
    if supported or (sys.platform == "darwin" and sys.version_info < (3, 13)):
        return ""
    return (
        f"\nbut it has no build for Python {platform.python_version()} on {sys.platform} {platform.machine()}: "
        "its last release is for Python up to 3.12, on Linux and Windows x86-64 and on macOS"
    )


def _wrong_build(folder: Path) -> str:
    return (
        f"{folder} is plain onnxruntime, which cannot train. The two builds install the same package and cannot "
        "share an environment: make a new one for the device and install "
        f"{REQUIREMENT} there, or replace it: pip uninstall onnxruntime onnxruntime-training-cpu, then "
        f"pip install {REQUIREMENT}"
    )


def _import_beside_stand_in(folder: Path) -> Any:
    if TRAINING in sys.modules:
        return importlib.import_module("onnxruntime")
    stand_in = types.ModuleType(TRAINING, "Stand-in that imports nothing; see lorac_runtime.engines.wheel.")
    stand_in.__path__ = []
    sys.modules[TRAINING] = stand_in
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError:
        del sys.modules[TRAINING]
        raise
    stand_in.__path__ = [str(folder / "training")]
    return ort
