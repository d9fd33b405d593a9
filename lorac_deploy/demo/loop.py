"""The demo's steps, each a command that a user could type."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lorac_deploy.demo import device
from lorac_deploy.demo.parts import PartsConfig, write_parts
from lorac_deploy.demo.results import Results
from lorac_runtime import manifest as mf
from lorac_runtime.errors import LoracDeployError, OutputError

FINETUNE = Path("runtime") / "ort_finetune.py"
WRITTEN = {"data", "base", "artifact", "adapted", "plot.png", "summary.json"}


def prepare(out: Path, device_python: Path) -> None:
    """Check the device's environment, and empty ``out`` of what an earlier demo left.

    Raises EngineError, or OutputError if ``out`` holds anything else or this is no checkout.
    """
    device.require_no_torch(device_python)
    foreign = {path.name for path in out.iterdir()} - WRITTEN if out.is_dir() else set()
    if foreign or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} holds what no demo wrote ({', '.join(sorted(foreign))}); choose another --out")
    if not FINETUNE.is_file():
        raise OutputError(f"{FINETUNE} not found: run the demo from the root of a checkout")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def run_loop(out: Path, device_python: Path, console: Console) -> Results:
    """Train, export, fine-tune, verify, evaluate; raises LoracDeployError if a step fails."""
    started = time.perf_counter()
    data, artifact, adapted = out / "data", out / "artifact", out / "adapted"
    config = PartsConfig()
    images = write_parts(data, config)
    for heading, command in _steps(out, device_python):
        console.rule(f"[bold]{heading}", align="left")
        _run(command, console)
    console.rule("[bold]verify: is it a drop-in?", align="left")
    drop_in = _verify(artifact / mf.BASE, adapted / "fused.onnx", console)
    console.rule("[bold]evaluate, in plain onnxruntime", align="left")
    accuracies = {
        f"{name}_{condition}": device.accuracy(device_python, model, artifact, data / f"test_{condition}.npz")
        for name, model in (("base", artifact / mf.BASE), ("adapted", adapted / "fused.onnx"))
        for condition in ("clean", "drifted")
    }
    report: dict[str, Any] = json.loads((adapted / "report.json").read_text(encoding="utf-8"))
    manifest = mf.load(artifact)
    return Results(
        **accuracies,
        trained_parameters=manifest.trained_parameters,
        model_parameters=manifest.model_parameters,
        engine=report["engine"],
        drop_in=drop_in,
        losses=tuple(report["epoch_losses"]),
        step_seconds=report["step_seconds"],
        peak_memory_bytes=report["peak_memory_bytes"],
        device_environment_bytes=device.installed_bytes(device_python),
        images=images,
        drift=f"{config.drift}, severity {config.severity}",
        seconds=time.perf_counter() - started,
    )


def _steps(out: Path, device_python: Path) -> list[tuple[str, list[str]]]:
    """(what it is, the command) of the three steps that learn."""
    base, artifact = str(out / "base"), str(out / "artifact")
    train = ["lorac-deploy", "train", "--data", str(out / "data" / "base.npz"), "--model", "resnet18", "--cifar-stem"]
    train += ["--method", "full", "--out", base]
    export = ["export-training-artifact", "--checkpoint", base, "--rank", "4", "--out", artifact]
    finetune = [str(device_python), str(FINETUNE), artifact, "--data", str(out / "data" / "local.npz")]
    return [
        ("cloud: train the base in PyTorch", train),
        ("build step: write the training artifact", export),
        ("device, without PyTorch: fine-tune and fuse", [*finetune, "--seed", "0", "--out", str(out / "adapted")]),
    ]


def _verify(base: Path, fused: Path, console: Console) -> bool:
    """Whether `lorac-deploy verify` finds a drop-in."""
    return _start(["lorac-deploy", "verify", str(base), str(fused)], console) == 0


def _run(command: list[str], console: Console) -> None:
    status = _start(command, console)
    if status:
        raise LoracDeployError(f"the demo's step `{shlex.join(command)}` failed with exit status {status}")


def _start(command: list[str], console: Console) -> int:
    """Show and run a command; our own ones are those of this environment, whatever PATH says."""
    console.print(f"$ {shlex.join(command)}", style="dim", highlight=False, soft_wrap=True)
    own = Path(sys.executable).parent / command[0]
    program = [str(own)] if own.is_file() else [command[0]]
    return subprocess.run([*program, *command[1:]], env=device.environment(), check=False).returncode
