"""How long does fusing a ResNet-18 take on the device, beyond reading and writing the file?

Each round fuses once and, in turn, copies the file in the same way without changing it (read, hash, write, fsync,
rename). Set-up and the first round are not counted. Not counted either: starting Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.environment import environment
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER, BASE, InputSpec
from lorac_runtime.patch import fuse

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


def measure(artifact: Path, scratch: Path, rounds: int) -> list[dict[str, float]]:
    """Interleaved rounds: the whole of `fuse`, its own count of its arithmetic, and a plain copy; seconds."""
    state = load_adapter(artifact / ADAPTER).tensors
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in state.items()}
    rows = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        report = fuse(artifact, scratch / "fused.onnx", state)
        whole = time.perf_counter() - started
        copied = copy_only(artifact / BASE, scratch / "copy.onnx")
        rows.append({"fuse": whole, "compute": report.compute_seconds, "copy": copied, "beyond": whole - copied})
    return rows[1:]


def main(argv: list[str]) -> int:
    """Measure, print, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fusing", description=__doc__)
    p.add_argument("--model", default="resnet18", help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    p.add_argument("--out", type=Path, help="JSON file")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        graph = export_graph(build(ModelSpec(args.model, classes=10, cifar_stem=True)), SPEC.shape)
        names = tuple(str(i) for i in range(10))
        config = ArtifactConfig(lora=LoraConfig())
        write_artifact(graph, scratch / "artifact", name=args.model, spec=SPEC, class_names=names, config=config)
        rows = measure(scratch / "artifact", scratch, args.rounds)
    summary = {
        part: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for part in rows[0]
        for values in [[row[part] for row in rows]]
    }
    for part, figures in summary.items():
        print(f"{part:8}" + "".join(f"  {name} {1000 * value:7.1f} ms" for name, value in figures.items()))
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment(), "seconds": summary, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
