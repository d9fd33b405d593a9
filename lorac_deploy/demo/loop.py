"""The demo's steps, each a command that a user could type."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorac_deploy.demo import device, lite
from lorac_deploy.demo.device import Device
from lorac_deploy.demo.parts import PartsConfig, write_parts
from lorac_deploy.demo.results import EngineRow, LiteRow, Results
from lorac_runtime import manifest as mf
from lorac_runtime.errors import LoracDeployError, OutputError

FINETUNE = Path("runtime") / "ort_finetune.py"
WRITTEN = {"data", "base", "artifact", "adapted", "adapted_training", "plot.png", "summary.json"}
CONDITIONS = ("clean", "drifted")


def prepare(out: Path, devices: Sequence[Device]) -> None:
    """Check the devices' environments, and empty ``out`` of what an earlier demo left.

    Raises EngineError, or OutputError if ``out`` holds anything else or this is no checkout.
    """
    for given in devices:
        device.require_no_torch(given.python)
    foreign = {path.name for path in out.iterdir()} - WRITTEN if out.is_dir() else set()
    if foreign or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} holds what no demo wrote ({', '.join(sorted(foreign))}); choose another --out")
    if not FINETUNE.is_file():
        raise OutputError(f"{FINETUNE} not found: run the demo from the root of a checkout")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def run_loop(out: Path, devices: Sequence[Device], console: Console) -> Results:
    """Train and export once; on each device fine-tune, verify, evaluate. Raises LoracDeployError if a step fails."""
    started = time.perf_counter()
    config = PartsConfig()
    images = write_parts(out / "data", config)
    for heading, command in _preparations(out):
        console.rule(f"[bold]{heading}", align="left")
        _run(command, console)
    base = _accuracies(devices[0], out / "artifact" / mf.BASE, out)
    rows = tuple(_adapted(out, given, console) for given in devices)
    manifest = mf.load(out / "artifact")
    return Results(
        base_clean=base["clean"],
        base_drifted=base["drifted"],
        trained_parameters=manifest.trained_parameters,
        model_parameters=manifest.model_parameters,
        engines=rows,
        images=images,
        drift=f"{config.drift}, severity {config.severity}",
        seconds=time.perf_counter() - started,
    )


def _preparations(out: Path) -> list[tuple[str, list[str]]]:
    """(what it is, the command) of what happens before any device is involved."""
    base, artifact = str(out / "base"), str(out / "artifact")
    train = ["lorac-deploy", "train", "--data", str(out / "data" / "base.npz"), "--model", "resnet18", "--cifar-stem"]
    train += ["--method", "full", "--out", base]
    export = ["export-training-artifact", "--checkpoint", base, "--rank", "4", "--engine", "both", "--out", artifact]
    return [("cloud: train the base in PyTorch", train), ("build step: write the training artifact", export)]


def _adapted(out: Path, given: Device, console: Console) -> EngineRow:
    """Fine-tune and fuse on a device, verify and evaluate what comes out."""
    folder, base = out / given.folder, out / "artifact" / mf.BASE
    console.rule(f"[bold]device, without PyTorch: fine-tune and fuse with {given.engine}", align="left")
    started = time.perf_counter()
    _run(_finetune(out, given), console)
    seconds = time.perf_counter() - started
    console.rule("[bold]verify: is it a drop-in?", align="left")
    drop_in = _verify(base, folder / "fused.onnx", console)
    tflite = _lite(out, folder, console) if "tflite" in given.formats else None
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    accuracies = _accuracies(given, folder / "fused.onnx", out)
    return EngineRow(
        engine=report["engine"],
        adapted_clean=accuracies["clean"],
        adapted_drifted=accuracies["drifted"],
        drop_in=drop_in,
        losses=tuple(report["epoch_losses"]),
        step_seconds=report["step_seconds"],
        peak_memory_bytes=report["peak_memory_bytes"],
        device_environment_bytes=device.installed_bytes(given.python),
        finetune_seconds=seconds,
        versions=report["versions"],
        tflite=tflite,
    )


def _lite(out: Path, folder: Path, console: Console) -> LiteRow:
    """Verify fused.tflite, and evaluate it in this process: a device needs its interpreter, not this package."""
    fused = folder / "fused.tflite"
    drop_in = _verify(out / "artifact" / mf.BASE_TFLITE, fused, console)
    console.print("accuracy of fused.tflite", style="dim")
    found = {c: lite.accuracy(fused, out / "artifact", out / "data" / f"test_{c}.npz") for c in CONDITIONS}
    return LiteRow(drop_in, fused.stat().st_size, adapted_clean=found["clean"], adapted_drifted=found["drifted"])


def _finetune(out: Path, given: Device) -> list[str]:
    command = [str(given.python), str(FINETUNE), str(out / "artifact"), "--data", str(out / "data" / "local.npz")]
    return [*command, "--engine", given.engine, "--seed", "0", "--to", given.formats, "--out", str(out / given.folder)]


def _accuracies(given: Device, model: Path, out: Path) -> dict[str, float]:
    """Accuracy of ``model`` on the clean and on the drifted images, in plain onnxruntime, without PyTorch."""
    artifact, data = out / "artifact", out / "data"
    return {c: device.accuracy(given.python, model, artifact, data / f"test_{c}.npz") for c in CONDITIONS}


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
