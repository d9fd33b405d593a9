"""How long does fusing a ResNet-18 take on the device, beyond reading and writing the file, and how much memory?

Each round fuses once and, in turn, copies the file in the same way without changing it (read, hash, write, fsync,
rename). Set-up and the first round are not counted. Not counted either: starting Python. Memory is the growth of a
process of its own while it fuses (see `fusing_worker`), with the trained state already loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lorac_deploy.bench.environment import environment
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.tflite_config import WEIGHTS, Weights
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FORMATS
from lorac_runtime.manifest import ADAPTER, InputSpec
from lorac_runtime.patch import fuse

STATE = "state.safetensors"
SPEC = InputSpec("input", (3, 32, 32), 1 / 255, (0.5,) * 3, (0.25,) * 3)


def copy_only(source: Path, target: Path) -> float:
    """Seconds to read, hash and write a file durably: what no way of fusing can avoid."""
    started = time.perf_counter()
    content = source.read_bytes()
    hashlib.sha256(content).hexdigest()
    beside = target.with_suffix(".part")
    with beside.open("wb") as stream:
        stream.write(content)
        os.fsync(stream.fileno())
    beside.rename(target)
    return time.perf_counter() - started


def measure(artifact: Path, scratch: Path, base: str, rounds: int) -> list[dict[str, float]]:
    """Interleaved rounds: the whole of `fuse`, its own count of its arithmetic, and a plain copy; seconds."""
    state = load_file(scratch / STATE)
    rows = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        report = fuse(artifact, scratch / "fused", state, base=base)
        whole = time.perf_counter() - started
        copied = copy_only(artifact / base, scratch / "copy")
        rows.append({"fuse": whole, "compute": report.compute_seconds, "copy": copied, "beyond": whole - copied})
    return rows[1:]


def extra_memory(artifact: Path, scratch: Path, base: str) -> dict[str, int]:
    """Peak bytes that fusing adds to a process; see `fusing_worker`. Linux only."""
    paths = [str(artifact), str(scratch / STATE), base, str(scratch / "fused")]
    command = [sys.executable, "-m", "benchmarks.fusing_worker", *paths]
    found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def make_artifact(folder: Path, model: str, weights: Weights) -> None:
    """An artifact of a network with random weights, and beside it a state that differs from its start everywhere."""
    graph = export_graph(build(ModelSpec(model, classes=10, cifar_stem=True)), SPEC.shape)
    rng = np.random.default_rng(0)
    write_artifact(
        graph,
        folder,
        name=model,
        spec=SPEC,
        class_names=tuple(str(i) for i in range(10)),
        config=ArtifactConfig(lora=LoraConfig(), tflite=weights),
        calibration=rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8) if weights == "int8" else None,
    )
    write_state(folder, folder.parent)


def write_state(artifact: Path, folder: Path) -> None:
    """A state of random numbers for an artifact, as `measure` and `extra_memory` find it in ``folder``."""
    rng, start = np.random.default_rng(0), load_adapter(artifact / ADAPTER).tensors
    state = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in start.items()}
    save_file(state, folder / STATE)


def main(argv: list[str]) -> int:
    """Measure, print, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fusing", description=__doc__)
    p.add_argument("--model", default="resnet18", help="default: %(default)s")
    p.add_argument("--format", choices=FORMATS, default="onnx", help="the file to fuse into (default: %(default)s)")
    p.add_argument("--weights", choices=WEIGHTS, default="float32", help="those of base.tflite (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    p.add_argument("--out", type=Path, help="JSON file")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch, artifact, base = Path(folder), Path(folder) / "artifact", FORMATS[args.format]
        make_artifact(artifact, args.model, args.weights)
        rows = measure(artifact, scratch, base, args.rounds)
        memory = extra_memory(artifact, scratch, base)
    summary = {
        part: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for part in rows[0]
        for values in [[row[part] for row in rows]]
    }
    for part, figures in summary.items():
        print(f"{part:10}" + "".join(f"  {name} {1000 * value:7.1f} ms" for name, value in figures.items()))
    for part, nbytes in memory.items():
        print(f"{part:10}  {nbytes / 1e6:.1f} MB above what there was before")
    if args.out:
        what = {"model": args.model, "format": args.format, "weights": args.weights}
        result = {**what, "environment": environment(), "seconds": summary, "bytes": memory, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
