"""What a fleet gains: 20 cameras, each with a drift of its own and a few labelled images of some classes only.

Handwritten digits (of scikit-learn), a ResNet-20 trained on the clean ones. Each client gets images of its own,
seen through its own corruption, and is tested on images that nobody trained on, seen through the same one. Compared are
the base, as many epochs on each client's own images alone, and what the fleet learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorac_deploy.bench.environment import environment
from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import Dataset, load_dataset
from lorac_deploy.export import export_training_artifact
from lorac_deploy.fleet.averaging import pairs_of
from lorac_deploy.fleet.rounds import FleetConfig
from lorac_deploy.fleet.server_state import ServerState
from lorac_deploy.fleet.simulation import LOCAL, TEST, FleetReport, clients_in, simulate
from lorac_deploy.fleet.strategy import FleetRules, Outcome
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.plan import LoraConfig
from lorac_runtime.adapter import load_adapter
from lorac_runtime.fleet.payload import Tensors
from lorac_runtime.manifest import ADAPTER, Manifest, load

DRIFTS = (
    ("gaussian_noise", 5), ("shot_noise", 5), ("impulse_noise", 5), ("defocus_blur", 5), ("motion_blur", 5),
    ("zoom_blur", 5), ("snow", 4), ("frost", 4), ("fog", 5), ("brightness", 5),
    ("contrast", 5), ("elastic_transform", 5), ("pixelate", 5), ("speckle_noise", 5), ("gaussian_blur", 5),
    ("spatter", 5), ("invert", 3), ("darken", 4), ("low_light", 3), ("fog_noise", 3),
)  # fmt: skip
TESTED = 100  # images


@dataclasses.dataclass(frozen=True)
class Way:
    """How the fleet trains: the adapters, whether heads are personal, and the numbers that travel."""

    name: str
    lora: LoraConfig
    personal: str = "none"
    numbers: str = "float16"


WAYS = (
    Way("adapters", LoraConfig(rank=1)),
    Way("adapters, lora_a frozen", LoraConfig(rank=2, freeze_a=True)),
    Way("adapters, personal heads", LoraConfig(rank=1), personal="head"),
)


def write_clients(
    folder: Path, pool: Dataset, seed: int, images: int, classes: int, clients: int, *, own: bool = False
) -> None:
    """A folder per client: ``images`` own images of ``classes`` classes, and `TESTED` of those left for its test.

    ``own``: it is tested on its own classes alone.
    """
    rng = np.random.default_rng(seed)
    free = list(rng.permutation(len(pool)))
    chosen: list[tuple[set[int], list[int]]] = []
    for _ in range(clients):
        known = set(rng.choice(len(pool.class_names), classes, replace=False).tolist())
        mine = [i for i in free if pool.labels[i] in known][:images]
        free = [i for i in free if i not in set(mine)]
        chosen.append((known, mine))
    for number, (known, mine) in enumerate(chosen):
        drift, severity = DRIFTS[number % len(DRIFTS)]
        home = folder / f"{number:02d}-{drift}"
        home.mkdir(parents=True)
        tests = [i for i in rng.permutation(free) if not own or pool.labels[i] in known]
        for name, index in ((LOCAL, mine), (TEST, tests[:TESTED])):
            part = pool.select(np.array(index))
            seen = corrupt(part.images, drift, severity, seed=seed)
            np.savez(home / name, images=seen, labels=part.labels)


def apart_error(manifest: Manifest, states: Sequence[Tensors]) -> float:
    """||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over all layers, with equal weights."""
    wrong, size = 0.0, 0.0
    for pair in pairs_of(manifest):
        blocks = [pair.blocks(state) for state in states]
        exact = np.mean([b @ a for a, b in blocks], axis=0)
        apart = np.mean([b for _, b in blocks], axis=0) @ np.mean([a for a, _ in blocks], axis=0)
        wrong += float(np.sum((apart - exact) ** 2))
        size += float(np.sum(exact**2))
    return float(np.sqrt(wrong / size))


@dataclasses.dataclass(frozen=True)
class Row:
    """A fleet: accuracies by client; by round the errors of averaging, and accuracy with what clients were sent."""

    way: str
    seed: int
    clients: dict[str, dict[str, float | None]]
    trained: int
    truncation: tuple[float, ...]
    apart: tuple[float, ...]
    by_round: tuple[float, ...]
    seconds: float


def run(way: Way, seed: int, args: argparse.Namespace, work: Path) -> Row:
    """One fleet, from its data to its figures."""
    artifact, data, out = work / "artifact", work / "clients", work / "fleet"
    config = ArtifactConfig(lora=dataclasses.replace(way.lora, seed=seed), tflite="none")
    export_training_artifact(args.base, artifact, config=config)
    pool = load_dataset("digits", split="test")
    write_clients(data, pool, seed, args.images, args.classes, args.clients, own=args.own)
    rules = FleetRules(
        artifact, args.epochs, args.lr, args.batch_size, seed, personal=way.personal, numbers=way.numbers
    )
    manifest, start = load(artifact), load_adapter(artifact / ADAPTER).tensors
    apart: list[float] = []

    def on_round(state: ServerState, outcome: Outcome) -> None:
        apart.append(apart_error(manifest, [{**start, **u.tensors} for u in outcome.updates]))
        print(f"{way.name}, seed {seed}: round {state.done}", file=sys.stderr)

    started = time.perf_counter()
    report = simulate(rules, clients_in(data), out, FleetConfig(rounds=args.rounds), on_round=on_round)
    return row(way, seed, report, manifest.trained_parameters, apart, time.perf_counter() - started)


def row(way: Way, seed: int, report: FleetReport, trained: int, apart: Sequence[float], seconds: float) -> Row:
    """The figures of a report."""
    before = [
        statistics.fmean(c.figures["accuracy"] for c in record.clients) for record in report.history.rounds
    ]  # each round's clients evaluate what they get
    return Row(
        way=way.name,
        seed=seed,
        clients={c.client: {"base": c.base, "local": c.local, "federated": c.federated} for c in report.clients},
        trained=trained,
        truncation=tuple(r.error for r in report.history.rounds),
        apart=tuple(apart),
        by_round=tuple(before),
        seconds=seconds,
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fleet", description=__doc__)
    p.add_argument("--base", type=Path, required=True, help="checkpoint folder of a network for 10 digits at 32 x 32")
    p.add_argument("--out", type=Path, required=True, help="the results, JSON; what it holds already is not repeated")
    p.add_argument("--ways", type=int, nargs="+", default=[0, 1, 2], help="which of the ways (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: %(default)s)")
    p.add_argument("--clients", type=int, default=20, help="clients (default: %(default)s)")
    p.add_argument("--images", type=int, default=12, help="labelled images of a client (default: %(default)s)")
    p.add_argument("--classes", type=int, default=4, help="classes among them (default: %(default)s)")
    p.add_argument("--own", action="store_true", help="test clients on these classes alone (default: on all)")
    p.add_argument("--rounds", type=int, default=8, help="rounds (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=4, help="epochs of a client in a round (default: %(default)s)")
    p.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of a client (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4, help="of a client (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and write it after each fleet."""
    args = parser().parse_args(argv)
    done = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    fields = ("clients", "images", "classes", "own", "rounds", "epochs", "lr", "batch_size")
    settings = {name: getattr(args, name) for name in fields}
    settings["tested"] = TESTED
    for seed in args.seeds:
        for way in (WAYS[i] for i in args.ways):
            if any(r["way"] == way.name and r["seed"] == seed for r in done):
                continue
            with tempfile.TemporaryDirectory() as work:
                done.append(dataclasses.asdict(run(way, seed, args, Path(work))))
            text = {"settings": settings, "environment": environment(), "rows": done}
            args.out.write_text(json.dumps(text, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
    return 0
