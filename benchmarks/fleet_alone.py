"""What a fleet's clients come to alone, at several learning rates: the comparison must not hang on the fleet's own.

The clients are those of ``python -m benchmarks fleet``, with the same data, the same artifact, and as many epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleet import WAYS, write_clients
from lorac_deploy.bench.environment import environment
from lorac_deploy.data import load_dataset
from lorac_deploy.export import export_training_artifact
from lorac_deploy.fleet.simulation import Client, clients_in, local_only
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_exporters.artifact import ArtifactConfig
from lorac_runtime.fleet.device import Place, open_device

RATES = (5e-3, 1e-3, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)


def accuracies(rules: FleetRules, clients: Sequence[Client], epochs: int, out: Path) -> list[float]:
    """The accuracy of each client after ``epochs`` on its own images, 0 to 1."""
    strategy, found = AdapterFedAvg(rules), []
    for client in clients:
        place = Place(rules.artifact, client.data, out / client.name, client.test, 0.0, threads=1, name=client.name)
        result = local_only(open_device(place), strategy, epochs)
        if result is None or result.accuracy is None:
            raise ValueError(f"client {client.name} has no samples to test on")
        found.append(result.accuracy)
    return found


def row(base: Path, settings: dict[str, Any], seed: int, rate: float) -> dict[str, Any]:
    """The clients of one seed at one learning rate."""
    with tempfile.TemporaryDirectory() as work:
        artifact, data = Path(work, "artifact"), Path(work, "clients")
        lora = dataclasses.replace(WAYS[0].lora, seed=seed)
        export_training_artifact(base, artifact, config=ArtifactConfig(lora=lora, tflite="none"))
        pool = load_dataset("digits", split="test")
        write_clients(data, pool, seed, settings["images"], settings["classes"], settings["clients"])
        rules = FleetRules(artifact, settings["epochs"], rate, settings["batch_size"], seed)
        epochs = settings["epochs"] * settings["rounds"]
        return {"seed": seed, "lr": rate, "accuracy": accuracies(rules, clients_in(data), epochs, Path(work, "out"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every seed at every rate and write it after each."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fleet_alone", description=__doc__)
    p.add_argument("--base", type=Path, required=True, help="the checkpoint folder that the fleet had")
    p.add_argument("--fleet", type=Path, required=True, help="what `python -m benchmarks fleet` wrote: its settings")
    p.add_argument("--out", type=Path, required=True, help="the results, JSON")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: %(default)s)")
    p.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak learning rates (default: %(default)s)")
    args = p.parse_args(argv)
    settings = json.loads(args.fleet.read_text(encoding="utf-8"))["settings"]
    rows: list[dict[str, Any]] = []
    for seed, rate in ((seed, rate) for seed in args.seeds for rate in args.rates):
        rows.append(row(args.base, settings, seed, rate))
        print(f"seed {seed}, lr {rate:g}: {statistics.fmean(rows[-1]['accuracy']):.3f}", file=sys.stderr)
        text = {"settings": settings, "environment": environment(), "rows": rows}
        args.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return 0
