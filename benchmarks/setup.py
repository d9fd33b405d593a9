"""Make the Python environments that other benchmarks need, from the pins in benchmarks/environments/.

Each environment is a folder below .envs/bench/. One that is in place, made from the same pins and able to import its
packages stays; any other is made anew. One that cannot be installed is reported and recorded, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import interpreters as envs
from benchmarks.footprint_probe import normalised
from lorac_runtime.files import atomic_write

Say = Callable[[str], None]
EDITABLE = "-e "
TELLING = 3  # lines of a failed command that are kept
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "demo", "docs", "tests", "*.egg-info", "__pycache__")
CHECKS = {  # what an environment must be able to do before it counts as installed
    envs.RUNTIME: "import onnxruntime, lorac_runtime.cli",
    envs.TRAINING: "from lorac_runtime.engines import wheel; wheel.load()",
    envs.TFLITE_RUNTIME: "import tflite_runtime.interpreter",
    envs.LITERT: "import ai_edge_litert.interpreter",
    envs.PYTORCH: "import torch, numpy, lorac_runtime.schedule",
    envs.EXECUTORCH: "import executorch.exir, executorch.runtime, executorch.backends.xnnpack.partition",
    envs.LITERT_TORCH: "import litert_torch",
    envs.ONNX2TF: "import onnx2tf",
    envs.ONNXSIM: "import onnxsim, onnxruntime, safetensors",
}


class SetupError(Exception):
    """A step of an installation failed; the message has the last telling lines of its output."""


def parsed_requirements(text: str) -> tuple[list[str], list[str]]:
    """(pinned packages, folders of the checkout that are installed editable) of a requirement file.

    >>> parsed_requirements("# for what\\nnumpy==2.4.6\\n\\n-e ./runtime\\n")
    (['numpy==2.4.6'], ['./runtime'])
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    editable = [line.removeprefix(EDITABLE).strip() for line in lines if line.startswith(EDITABLE)]
    return [line for line in lines if not line.startswith(EDITABLE)], editable


def telling_lines(output: str) -> str:
    """The last lines that say why a command failed: its errors, else the last lines of all.

    >>> telling_lines("Collecting x\\nERROR: no x==9\\nERROR: nothing fits\\n[notice] a newer pip exists")
    'ERROR: no x==9; ERROR: nothing fits'
    """
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal")) or "Error:" in line]
    return "; ".join((errors or lines)[-TELLING:]) or "it said nothing"


def _run(command: Sequence[str | Path], what: str) -> None:
    done = subprocess.run([str(c) for c in command], cwd=envs.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{what}: {telling_lines(done.stdout + done.stderr)}")


def _pip(name: str, *arguments: str | Path) -> list[str | Path]:
    verb, *rest = arguments
    quiet = ["--no-input", "--disable-pip-version-check"]
    return [envs.interpreter(name), "-m", "pip", verb, *quiet, *rest]


def release(file: Path) -> str:
    """What a wheel holds, as a pin with a normalised name, without a local suffix such as +cpu.

    >>> release(Path("ml_dtypes-0.6.0-cp311-cp311-linux_x86_64.whl"))
    'ml-dtypes==0.6.0'
    """
    name, version, *_ = file.name.split("-")
    return f"{normalised(name)}=={version.split('+')[0]}"


def bare_environment(name: str) -> None:
    """Make an environment anew, with pip and nothing else. Raises SetupError."""
    _run([sys.executable, "-m", "venv", "--clear", envs.folder(name)], "making the environment")


def install(name: str, scratch: Path, say: Say) -> dict[str, int]:
    """Make an environment anew; bytes of every wheel that it was made from. Raises SetupError."""
    pins, editable = parsed_requirements(envs.requirements(name).read_text(encoding="utf-8"))
    wheels = scratch / "wheels"
    wheels.mkdir()
    (scratch / "pins.txt").write_text("\n".join(pins) + "\n")
    bare_environment(name)
    say(f"{name}: fetching {len(pins)} packages")
    _run(_pip(name, "wheel", "--no-deps", "--wheel-dir", wheels, "-r", scratch / "pins.txt"), "fetching")
    say(f"{name}: installing")
    _run(_pip(name, "install", "--no-deps", "--no-index", *sorted(wheels.glob("*.whl"))), "installing")
    for index, source in enumerate(editable):
        _run(_pip(name, "install", "--no-deps", EDITABLE.strip(), source), f"installing {source}")
        copy = scratch / str(index)  # a build writes into its sources
        shutil.copytree(envs.ROOT / source, copy, ignore=NOT_SOURCE)
        _run(_pip(name, "wheel", "--no-deps", "--wheel-dir", wheels, copy), f"building {source}")
    return {release(file): file.stat().st_size for file in sorted(wheels.glob("*.whl"))}


def check(name: str) -> None:
    """Raise SetupError if the environment cannot import what it is for."""
    _run([envs.interpreter(name), "-I", "-c", CHECKS[name]], "importing")


def create(name: str, say: Say) -> envs.Installed:
    """Make an environment anew and record how that went."""
    started, wheels, error = time.perf_counter(), {}, ""
    envs.record(name).unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheels = install(name, Path(scratch), say)
        check(name)
    except SetupError as err:
        error = str(err)
    seconds = time.perf_counter() - started
    found = envs.Installed(not error, error, envs.digest(name), round(seconds, 1), wheels)
    envs.folder(name).mkdir(parents=True, exist_ok=True)
    atomic_write(envs.record(name), json.dumps(dataclasses.asdict(found), indent=1).encode())
    return found


def in_place(name: str) -> bool:
    """Whether an environment is made from the pins as they are now, and imports its packages."""
    if envs.lacking(name):
        return False
    try:
        check(name)
    except SetupError:
        return False
    return True


def create_all(names: Sequence[str], say: Say) -> Mapping[str, str]:
    """Make or keep each environment; the reasons, by name, of those that cannot be installed."""
    failed = {}
    for name in names:
        if in_place(name):
            say(f"{name}: in place")
            continue
        found = create(name, say)
        size = sum(found.wheels.values()) / 1e6
        say(f"{name}: {f'made in {found.seconds:.0f} s from {size:.0f} MB of wheels' if found.ok else found.error}")
        if not found.ok:
            failed[name] = found.error
    return failed


def main(argv: list[str]) -> int:
    """Make the environments; status 1 if one could not be."""
    p = argparse.ArgumentParser(prog="python -m benchmarks setup", description=__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(envs.MADE)} (default: all)")
    names = p.parse_args(argv).names
    if unknown := [name for name in names if name not in envs.MADE]:
        p.error(f"no environment {', '.join(unknown)}: choose from {', '.join(envs.MADE)}")
    failed = create_all(names or envs.MADE, lambda line: print(line, flush=True))
    for name, reason in failed.items():
        print(f"not installed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0
