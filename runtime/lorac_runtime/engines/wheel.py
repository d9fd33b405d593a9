"""Import onnxruntime alone, the plain or the training build, without the frameworks that its package files pull in.

``import onnxruntime`` of the training build tries ``onnxruntime.training.ortmodule``, and that imports torch and
onnx wherever these are installed; so does ``import onnxruntime.training``. An empty stand-in for
``onnxruntime.training`` keeps both out: while onnxruntime loads it has no search path, afterwards the real one.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import re
import sys
import types
from pathlib import Path
from typing import Any

from lorac_runtime.errors import EngineError

REQUIREMENT = "onnxruntime-training-cpu==1.19.2"
EXTRA = "lorac-runtime[onnxruntime]"
OLDEST = (1, 17)  # of onnxruntime; older ones have not been tried
TRAINING = "onnxruntime.training"
FATAL = 4  # severity of the native log; errors reach the user as exceptions


@dataclasses.dataclass(frozen=True)
class Wheel:
    """The modules of the training build: ``ort`` for sessions, ``api`` for training."""

    ort: Any
    api: Any
    version: str


def load() -> Wheel:
    """Import the training build (once; later calls are free).

    Raises EngineError with the pip command if it is missing, with the reason if another build is in its place.
    """
    folder = _package_folder()
    if folder is None:
        raise EngineError(
            "the engine onnxruntime-training needs a package that is not installed here: "
            f"pip install {REQUIREMENT}{_why_pip_may_fail()}"
        )
    if not (folder / "training" / "api").is_dir():
        raise EngineError(_wrong_build(folder))
    ort = _imported(folder)
    api = _loaded(folder, f"{TRAINING}.api")
    if not hasattr(_loaded(folder, "onnxruntime.capi._pybind_state"), "CheckpointState"):
        raise EngineError(_wrong_build(folder))
    return Wheel(ort, api, str(ort.__version__))


def load_inference() -> Any:
    """Import onnxruntime for inference: the plain build, or what the training build has of it.

    Raises EngineError with the pip command if it is missing or too old, with the reason if it does not load.
    """
    folder = _package_folder()
    if folder is None:
        raise EngineError(
            f"the engine onnxruntime needs a package that is not installed here: pip install {EXTRA}\n"
            "It and onnxruntime-training-cpu install the same package and cannot share an environment; "
            "where the latter is installed, this engine uses it"
        )
    ort = _imported(folder)
    found = re.match(r"(\d+)\.(\d+)", str(getattr(ort, "__version__", "")))
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise EngineError(
            f"{folder} is onnxruntime {getattr(ort, '__version__', 'of no version')}, the engine onnxruntime needs "
            f"{'.'.join(map(str, OLDEST))} or newer: pip install --upgrade {EXTRA}"
        )
    return ort


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _imported(folder: Path) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the native library loads
    if TRAINING in sys.modules:
        ort = _loaded(folder, "onnxruntime")
    else:
        ort = _import_beside_stand_in(folder)
    if hasattr(ort, "set_default_logger_severity"):  # absent where a package is broken, which the caller tells
        ort.set_default_logger_severity(FATAL)
    return ort


def _import_beside_stand_in(folder: Path) -> Any:
    stand_in = types.ModuleType(TRAINING, "Stand-in that imports nothing; see lorac_runtime.engines.wheel.")
    stand_in.__path__ = []
    sys.modules[TRAINING] = stand_in
    kept = False
    try:
        ort = _loaded(folder, "onnxruntime")
        kept = (folder / "training").is_dir()
    finally:
        if not kept:
            del sys.modules[TRAINING]
    stand_in.__path__ = [str(folder / "training")]
    return ort


def _loaded(folder: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise EngineError(f"onnxruntime is installed in {folder} but does not load: {err}") from err


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
        f"{folder} is plain onnxruntime, which cannot train by itself. The two builds install the same package and "
        "cannot share an environment: use an artifact with the engine onnxruntime, which needs no other, or make a "
        f"new environment for the device and install {REQUIREMENT} there, or replace it: "
        f"pip uninstall onnxruntime onnxruntime-training-cpu, then pip install {REQUIREMENT}"
    )
