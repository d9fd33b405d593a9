"""A fleet in one process: clients from folders of data, the same apps and strategy as on real devices."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorac_deploy.fleet.local_grid import App, LocalGrid
from lorac_deploy.fleet.rounds import FleetConfig, Learned, OnRound, run_rounds
from lorac_deploy.fleet.server_state import ServerState
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules, Outcome
from lorac_runtime.errors import DataError, listed
from lorac_runtime.files import atomic_write
from lorac_runtime.fleet.client import client_app
from lorac_runtime.fleet.device import Device, Order, Place, open_device
from lorac_runtime.fleet.join import node_config
from lorac_runtime.fleet.payload import to_wire
from lorac_runtime.manifest import BASE
from lorac_runtime.training import Evaluation

LOCAL, TEST = "local.npz", "test.npz"
REPORT, CLIENTS = "fleet.json", "clients"
OnProgress = Callable[[str, int, int | None], None]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Client:
    """A simulated client: its name, its training data, and samples for accuracies, where it has some."""

    name: str
    data: Path
    test: Path | None


@dataclasses.dataclass(frozen=True)
class ClientResult:
    """Accuracies of a client on its own samples that nothing trained on, 0 to 1; None where it has none.

    ``base`` is the artifact's own adapter, ``local`` as many epochs on the client's data alone, ``federated`` what the
    fleet learned, with the client's own head where that is personal. ``failed`` says why a figure is missing.
    """

    client: str
    samples: int
    base: float | None
    local: float | None
    federated: float | None
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class FleetReport:
    """What a simulated fleet came to. ``model_bytes`` is the size of the network's file, which is not sent; ``down``
    and ``up`` are bytes of tensors per client and round, as sent, with numpy's headers.
    """

    clients: tuple[ClientResult, ...]
    history: ServerState
    model_bytes: int
    down: float
    up: float

    @property
    def share(self) -> float:
        """Bytes that travel beside those of sending the model both ways."""
        return (self.down + self.up) / (2 * self.model_bytes)

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps({**dataclasses.asdict(self), "share": self.share}, indent=1) + "\n"


def clients_in(folder: Path, most: int | None = None) -> tuple[Client, ...]:
    """The clients of a folder, by name: a sub-folder each with local.npz and perhaps test.npz, or NAME.npz files.

    Raises DataError if there are none, or fewer than ``most``, or listing sub-folders without data.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one with a sub-folder ({LOCAL}, {TEST}) for each client")
    found, empty = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / LOCAL).is_file():
            found.append(Client(path.name, path / LOCAL, path / TEST if (path / TEST).is_file() else None))
        elif path.is_dir():
            empty.append(f"{path.name} has no {LOCAL}")
        elif path.suffix == ".npz":
            found.append(Client(path.stem, path, None))
    if empty:
        raise DataError(listed(f"{folder} holds folders that are no clients:", empty))
    if len(found) < (most or 1):
        raise DataError(f"{folder} holds {len(found)} clients, expected at least {most or 1}")
    return tuple(found[:most])


def simulate(
    rules: FleetRules,
    clients: Sequence[Client],
    out: Path,
    config: FleetConfig,
    *,
    workers: int = 2,
    app: App | None = None,
    on_progress: OnProgress | None = None,
    on_round: OnRound | None = None,
) -> FleetReport:
    """Run a fleet of ``clients`` in this process and compare it with each of them alone; ``out``/fleet.json has all.

    ``app`` answers for the clients (None: what a device runs). A run that was killed goes on after its last round.

    Raises what `run_rounds` raises, and DataError, ArtifactError if a client cannot begin.
    """
    if len(clients) < config.min_clients:
        raise DataError(f"{len(clients)} clients can give no {config.min_clients} answers; lower --min-clients")
    told = on_progress or _silent
    places = {c.name: _place(rules.artifact, c, out, threads=1) for c in clients}
    devices = {name: open_device(place) for name, place in places.items()}
    nodes = [node_config(place) for place in places.values()]

    def counted(state: ServerState, outcome: Outcome) -> None:
        told(_line(outcome), state.done, config.rounds)
        if on_round is not None:
            on_round(state, outcome)

    told("rounds", 0, config.rounds)
    with LocalGrid(app or client_app(), nodes, workers=workers) as grid:
        learned = run_rounds(grid, rules, out, config, on_round=counted)
    results = _compared(rules, devices, learned, config, told)
    report = _report(rules, results, learned)
    atomic_write(out / REPORT, report.to_json().encode())
    return report


def local_only(device: Device, strategy: AdapterFedAvg, epochs: int) -> Evaluation | None:
    """How a client does after so many ``epochs`` on its own data, without a fleet; None without samples to test on."""
    if not len(device.held_out):
        return None
    rules = strategy.rules
    order = Order(strategy.digest, 1, epochs, rules.lr, rules.batch_size, rules.seed)
    every = AdapterFedAvg(dataclasses.replace(rules, personal="none", numbers="float32")).payload
    trained = device.train(to_wire(every, strategy.start_state), order)
    return device.evaluate(trained.tensors, order)


def _place(artifact: Path, client: Client, out: Path, *, threads: int) -> Place:
    fraction = 0.0 if client.test is not None else Place.val_fraction
    folder = out / CLIENTS / client.name
    return Place(artifact, client.data, folder, client.test, fraction, threads=threads, name=client.name)


def _compared(
    rules: FleetRules, devices: Mapping[str, Device], learned: Learned, config: FleetConfig, told: OnProgress
) -> tuple[ClientResult, ...]:
    strategy = AdapterFedAvg(rules)
    said = {one.client: one for one in learned.clients}
    results = []
    for number, (name, device) in enumerate(devices.items()):
        told("each client alone", number, len(devices))
        local = local_only(device, strategy, config.rounds * rules.epochs)
        own = said.get(name)
        results.append(
            ClientResult(
                client=name,
                samples=len(device.training),
                base=own.figures.get("base-accuracy") if own else None,
                local=None if local is None else local.accuracy,
                federated=own.figures.get("accuracy") if own else None,
                failed=own.failed if own else "it gave no answer about the last adapter",
            )
        )
    return tuple(results)


def _report(rules: FleetRules, results: tuple[ClientResult, ...], learned: Learned) -> FleetReport:
    rounds = learned.history.rounds
    asked = sum(r.asked for r in rounds)
    answered = sum(len(r.clients) + sum(line.startswith("rejected") for line in r.refused) for r in rounds)
    return FleetReport(
        clients=results,
        history=learned.history,
        model_bytes=(rules.artifact / BASE).stat().st_size,
        down=sum(r.down for r in rounds) / asked,
        up=sum(r.up for r in rounds) / answered,
    )


def _silent(what: str, done: int, total: int | None) -> None:
    del what, done, total


def _line(outcome: Outcome) -> str:
    lost = len(outcome.rejected) + len(outcome.failed) + outcome.silent
    scores = [u.figures["accuracy"] for u in outcome.updates if "accuracy" in u.figures]
    shown = f", {100 * sum(scores) / len(scores):.1f} % before this round" if scores else ""
    return f"rounds ({len(outcome.updates)} clients{f', {lost} lost' if lost else ''}{shown})"
