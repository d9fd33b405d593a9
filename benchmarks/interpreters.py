"""Python environments that competitors run in, each with packages that cannot share one.

``project`` is the environment that runs the benchmarks (.venv). The others lie under .envs/ and are made by
``python -m benchmarks setup``, from the newest releases at that time; every result names the versions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "project"
RUNTIME = "bench-ort"
ONNXSIM = "bench-onnxsim"
LITERT_TORCH, ONNX2TF = "bench-litert-torch", "bench-onnx2tf"
TFLITE_RUNTIME, LITERT = "tflite-runtime", "litert"  # made by `make tflite-env`
PACKAGES: dict[str, tuple[str, ...]] = {
    RUNTIME: ("onnxruntime", "numpy>=2", "-e", "./runtime"),  # editable: what is measured is this checkout
    ONNXSIM: ("onnxsim==0.8.1", "onnxruntime", "numpy>=2", "safetensors"),
    LITERT_TORCH: ("torch==2.13.0", "litert-torch==0.10.0"),  # torch named, or pip takes a build for CUDA
    ONNX2TF: ("onnx2tf==1.29.24", "tensorflow-cpu==2.19.1", "tf_keras==2.19.0", "onnx==1.19.1", "onnxruntime"),
}
NAMES = (PROJECT, *PACKAGES, TFLITE_RUNTIME, LITERT)


def python(name: str, given: Mapping[str, Path]) -> Path:
    """The interpreter of an environment: a ``given`` one, or the one that `create` made.

    Raises FileNotFoundError with the command that makes it.
    """
    if name in given:
        return given[name]
    if name == PROJECT:
        return Path(sys.executable)
    path = _folder(name) / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no environment {name} in {path.parent.parent}: run `{_maker(name)}`, "
            f"or name its interpreter with --python {name}=PATH"
        )
    return path


def _maker(name: str) -> str:
    return "python -m benchmarks setup" if name in PACKAGES else "make tflite-env"


def create(name: str) -> Path:
    """Make an environment of `PACKAGES` anew, or mend it, with the Python that runs this; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(_folder(name))], check=True)
    interpreter = _folder(name) / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check"]
    subprocess.run([*install, "setuptools>=77"], check=True)
    subprocess.run([*install, "--no-build-isolation", *PACKAGES[name]], check=True, cwd=ROOT)
    return interpreter


def parsed_interpreters(texts: list[str]) -> dict[str, Path]:
    """NAME=PATH of --python options.

    >>> parsed_interpreters(["bench-ort=/opt/ort/bin/python"])
    {'bench-ort': PosixPath('/opt/ort/bin/python')}

    Raises ValueError for an unknown name or a text without one.
    """
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, path) in zip(texts, pairs, strict=True) if name not in NAMES or not path]
    if wrong:
        raise ValueError(f"--python wants NAME=PATH with a name of {', '.join(NAMES)}; got {', '.join(wrong)}")
    return {name: Path(path) for name, _, path in pairs}


def _folder(name: str) -> Path:
    return ROOT / ".envs" / name


def main(argv: list[str]) -> int:
    """Make the environments."""
    p = argparse.ArgumentParser(prog="python -m benchmarks setup", description=__doc__)
    p.add_argument("--only", choices=tuple(PACKAGES), action="append", help="just this one (may be repeated)")
    for name in p.parse_args(argv).only or PACKAGES:
        print(f"{name}: {', '.join(PACKAGES[name])}", flush=True)
        print(f"  {create(name)}")
    return 0
