"""`lorac-deploy federate ARTIFACT`: many devices learn one adapter together, simulated here or over the network."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._progress import counted
from lorac_deploy.commands._tables import standard_output
from lorac_runtime.fleet.payload import NUMBERS, PERSONAL

if TYPE_CHECKING:
    from lorac_deploy.fleet.rounds import FleetConfig
    from lorac_deploy.fleet.simulation import FleetReport
    from lorac_deploy.fleet.strategy import FleetRules

SIMULATED, SERVED = ("plot", "workers", "data_dir"), ("certificate", "key", "ca_certificate", "wait")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy federate",
        description="Train one adapter on many devices, by Flower: in each round devices start from the fleet's "
        "adapter, train on their own data and send the adapter's tensors back, nothing else; the server takes their "
        "mean as a change of the weights. With --data-dir the devices are simulated, and each is compared with "
        "training alone; with --server real ones connect (lorac-join). Interrupted, the same command goes on after "
        "the last whole round.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote; every device needs a copy")
    p.add_argument("--out", type=Path, required=True, help="folder for adapter.safetensors and the fleet's state")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--data-dir", type=Path, help="simulate: a folder with a sub-folder for each client (local.npz, test.npz)"
    )
    where.add_argument("--server", metavar="HOST:PORT", help="listen here for devices, such as 0.0.0.0:9092")
    _add_rules(p.add_argument_group("rounds"))
    g = p.add_argument_group("with --data-dir")
    g.add_argument("--workers", type=int, help="clients that train at once (default: 2)")
    g.add_argument("--plot", type=Path, help="draw each client's accuracies into this .png file")
    g = p.add_argument_group("with --server")
    g.add_argument("--wait", type=float, help="seconds to wait until enough devices are connected (default: 600)")
    g.add_argument("--certificate", type=Path, help="the server's certificate (PEM), for its address and 127.0.0.1")
    g.add_argument("--key", type=Path, help="the certificate's private key (PEM)")
    g.add_argument("--ca-certificate", type=Path, help="the certificate of the authority that signed it (PEM)")
    return p


def _add_rules(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--rounds", type=int, default=10, help="rounds in all (default: %(default)s)")
    g.add_argument("--epochs", type=int, default=1, help="epochs of a client in a round (default: %(default)s)")
    g.add_argument("--clients", type=int, help="simulate the first N clients; with --server, wait for so many devices")
    g.add_argument(
        "--min-clients", type=int, default=2, help="a round needs so many answers that count (default: %(default)s)"
    )
    g.add_argument("--fraction", type=float, default=1.0, help="share of clients in a round (default: %(default)s)")
    g.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for answers (default: %(default)s)")
    g.add_argument("--lr", type=float, help="peak learning rate of clients (default: the artifact's)")
    g.add_argument("--batch-size", type=int, help="of clients (default: the artifact's)")
    g.add_argument("--seed", type=int, default=0, help="of orders of samples, choice of clients (default: %(default)s)")
    g.add_argument(
        "--personal", choices=PERSONAL, default="none", help="what stays on each client (default: %(default)s)"
    )
    g.add_argument("--payload", choices=NUMBERS, default="float32", help="numbers that travel (default: %(default)s)")
    g.add_argument(
        "--max-norm",
        type=float,
        default=5.0,
        help="a change above so many times the median of the round's clients is rejected (default: %(default)s)",
    )
    g.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    _refuse_idle(p, args)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # its own summary of every round would break the progress line
    from lorac_deploy.fleet.rounds import FleetConfig
    from lorac_deploy.fleet.strategy import FleetRules

    with usage_errors(p):
        _require_positive(args)
        rules = FleetRules(
            artifact=args.artifact,
            epochs=args.epochs,
            lr=args.lr,
            batch_size=args.batch_size,
            seed=args.seed,
            personal=args.personal,
            numbers=args.payload,
            most_norm=args.max_norm,
        )
        config = FleetConfig(args.rounds, args.min_clients, args.fraction, args.timeout, args.wait or 600.0)
    return _simulated(args, rules, config) if args.data_dir else _served(p, args, rules, config)


def _refuse_idle(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    idle = SERVED if args.data_dir is not None else SIMULATED
    given = [f"--{name.replace('_', '-')}" for name in idle if getattr(args, name) is not None]
    if given:
        p.error(f"{', '.join(given)} would change nothing with {'--data-dir' if args.data_dir else '--server'}")


def _require_positive(args: argparse.Namespace) -> None:
    for name in ("epochs", "clients", "batch_size", "workers", "lr", "max_norm"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name.replace('_', '-')} must be above 0, got {value}")
    if args.seed < 0:
        raise ValueError(f"seed must be at least 0, got {args.seed}")
    if args.clients is not None and args.clients < args.min_clients:
        raise ValueError(f"{args.clients} clients can give no {args.min_clients} answers; lower --min-clients")


def _simulated(args: argparse.Namespace, rules: FleetRules, config: FleetConfig) -> int:
    from lorac_deploy.fleet.simulation import clients_in, simulate

    clients = clients_in(args.data_dir, args.clients)
    with counted("reading") as told:
        report = simulate(rules, clients, args.out, config, workers=args.workers or 2, on_progress=told)
    if args.plot is not None:
        from lorac_deploy.fleet.plot import draw

        draw(report.clients, args.plot)
    if args.json:
        print(report.to_json(), end="")
    else:
        _show(report, args.out)
    return 0


def _served(p: argparse.ArgumentParser, args: argparse.Namespace, rules: FleetRules, config: FleetConfig) -> int:
    from lorac_deploy.fleet.serving import Listening, serve

    with usage_errors(p):
        listening = Listening(args.server, args.certificate, args.key, args.ca_certificate)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a service manager, Flower's processes end too
    with counted("waiting for devices") as told:
        outcome = serve(rules, listening, args.out, config, connect=args.clients, on_progress=told)
    if args.json:
        print(json.dumps(outcome["clients"], indent=1))
        return 0
    table = Table("device", "before", "federated", title=str(args.out / "adapter.safetensors"))
    for client in outcome["clients"]:
        figures = client["figures"]
        shown = (_percent(figures.get("base-accuracy")), _percent(figures.get("accuracy")))
        table.add_row(client["client"], *(shown if not client["failed"] else ("", client["failed"])))
    standard_output().print(table)
    return 0


def _show(report: FleetReport, out: Path) -> None:
    console = standard_output()
    table = Table("client", "samples", "before %", "alone %", "federated %", title=str(out / "adapter.safetensors"))
    for c in report.clients:
        table.add_row(c.client, str(c.samples), *(_percent(v) for v in (c.base, c.local, c.federated)))
    table.add_section()
    means = [_mean([getattr(c, name) for c in report.clients]) for name in ("base", "local", "federated")]
    table.add_row("mean", "", *(_percent(v) for v in means))
    console.print(table)
    last = report.history.rounds[-1]
    console.print(
        f"{report.down:,.0f} bytes to and {report.up:,.0f} bytes from each client in a round: "
        f"{100 * report.share:.2f} % of sending the model ({report.model_bytes:,} bytes) both ways",
        soft_wrap=True,
    )
    console.print(f"error of keeping the last mean by factors, in its worst layer: {100 * last.error:.1f} %")
    for line in [line for record in report.history.rounds for line in record.refused]:
        console.print(line, soft_wrap=True, markup=False)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
