"""What a device of a fleet sends and receives in a round, on the wire: counted by a relay in front of Flower's server.

Fleets of one device with 1 and with 5 rounds; a fourth of the difference is a round, with everything that Flower adds
while it lasts: identifiers, asking for work, signs of life. Weights are random, since only their number counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lorac_deploy.bench.environment import environment
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.export import export_training_artifact
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.plan import LoraConfig
from lorac_runtime.fleet.messages import nbytes
from lorac_runtime.manifest import BASE, InputSpec

INPUT = InputSpec("input", (3, 32, 32), 1 / 255, (0.5,) * 3, (0.25,) * 3)
LOCAL = "127.0.0.1"
ROUNDS = (1, 5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its adapters, and the numbers that travel."""

    model: str
    lora: LoraConfig
    numbers: str


CASES = (
    Case("resnet20", LoraConfig(rank=1), "float16"),
    Case("resnet20", LoraConfig(rank=2, freeze_a=True), "float16"),
    Case("resnet18", LoraConfig(rank=4), "float32"),
    Case("resnet18", LoraConfig(rank=4), "float16"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes of a round, one way or as said: ``tensors`` as they are serialized, ``up`` and ``down`` on the wire."""

    model: str
    rank: int
    freeze_a: bool
    numbers: str
    model_bytes: int
    tensors: int
    up: float
    down: float
    tensors_share: float
    wire_share: float


class Relay:
    """Hands on what comes to ``port``, and counts it: ``counts`` are bytes [from the device, to the device]."""

    def __init__(self, target: int) -> None:
        self.counts, self._target = [0, 0], target
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, LOCAL, 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(LOCAL, self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, far_writer, 0), self._pump(far_reader, writer, 1))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self.counts[way] += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


def measured(case: Case, work: Path) -> Row:
    """Export, run both fleets, take the difference."""
    net, spec = build(ModelSpec(case.model, classes=10)), ModelSpec(case.model, classes=10)
    names = tuple(str(i) for i in range(10))
    save_checkpoint(work / "base", net, spec, input_spec=INPUT, class_names=names, metrics={})
    config = ArtifactConfig(lora=case.lora, tflite="none")
    export_training_artifact(work / "base", work / "artifact", config=config)
    rng = np.random.default_rng(0)
    np.savez(work / "local.npz", images=rng.integers(0, 255, (12, 32, 32, 3), np.uint8), labels=np.arange(12) % 10)
    few, many = (counted(case, work, rounds) for rounds in ROUNDS)
    up, down = ((b - a) / (ROUNDS[1] - ROUNDS[0]) for a, b in zip(few, many, strict=True))
    strategy = AdapterFedAvg(FleetRules(work / "artifact", numbers=case.numbers))
    tensors, size = nbytes(strategy.initial_arrays()), (work / "artifact" / BASE).stat().st_size
    return Row(
        case.model, case.lora.rank, case.lora.freeze_a, case.numbers, size, tensors, up, down,
        tensors / size, (up + down) / (2 * size),
    )  # fmt: skip


def counted(case: Case, work: Path, rounds: int) -> list[int]:
    """Bytes [up, down] of a whole fleet of one device. Raises RuntimeError if it fails."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        port = int(probe.getsockname()[1])
    relay, programs = Relay(port), Path(sys.executable).parent
    serve = [str(programs / "lorac-deploy"), "federate", str(work / "artifact"), "--server", f"{LOCAL}:{port}"]
    serve += ["--rounds", str(rounds), "--min-clients", "1", "--payload", case.numbers]
    join = [str(programs / "lorac-join"), str(work / "artifact"), "--server", f"{LOCAL}:{relay.port}", "--insecure"]
    join += ["--data", str(work / "local.npz"), "--val-fraction", "0", "--out", str(work / f"joined{rounds}")]
    with running(join):
        done = subprocess.run(
            [*serve, "--out", str(work / f"fleet{rounds}")], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return list(relay.counts)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[None]:
    """A command that is asked to end with the block."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases and write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fleet_traffic", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="the results, JSON")
    args = p.parse_args(argv)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(dataclasses.asdict(measured(case, Path(work))))
        text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0
