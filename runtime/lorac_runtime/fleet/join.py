"""``lorac-join``: a device joins a fleet. What it starts is the SuperNode of Flower, configured for this project."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lorac_runtime.cli_parts import add_version
from lorac_runtime.config import ENGINES
from lorac_runtime.engines import AUTO
from lorac_runtime.errors import EngineError, LoracDeployError
from lorac_runtime.fleet.device import Place, open_device
from lorac_runtime.fleet.leash import leashed
from lorac_runtime.fleet.messages import require_flower
from lorac_runtime.trust import require_signed

PROG = "lorac-join"
DESCRIPTION = (
    "Join a fleet that learns together: wait for the server's rounds, train the artifact's adapter on local data, and "
    "send the adapter's tensors, the number of samples, losses and accuracies. Images and labels stay here. When the "
    "fleet is done, OUT holds adapter.safetensors and fused.onnx. Runs until it is ended (Ctrl-C); ended and started "
    "again, it goes on."
)
INTERRUPTED = 130
ATTEMPTS, BRIEF, PAUSE = 3, 10.0, 3.0  # tries in a row; what is right after the start, and between two, in seconds
LOCAL = "127.0.0.1"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=PROG, description=DESCRIPTION)
    add_version(p)
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote: the same as the server's")
    p.add_argument("--server", required=True, metavar="HOST:PORT", help="where lorac-deploy federate --server listens")
    p.add_argument("--data", type=Path, required=True, help="local data, as lorac-finetune takes them")
    p.add_argument("--out", type=Path, required=True, help="folder for the device's own head, adapter and fused file")
    p.add_argument("--test", type=Path, help="samples for accuracies (default: a part of --data is held out)")
    p.add_argument(
        "--val-fraction",
        type=float,
        help=f"share of the samples held out for accuracies (default: {Place.val_fraction}, with --test none)",
    )
    p.add_argument("--name", default="", help="what the server's log calls this device (default: a number)")
    p.add_argument("--engine", choices=ENGINES, default=AUTO, help="what trains (default: %(default)s)")
    p.add_argument("--threads", type=int, help="threads of the engine (default: its own choice)")
    p.add_argument(
        "--trust", type=Path, metavar="KEY", help="refuse an artifact that was not signed: the public key, a PEM file"
    )
    p.add_argument(
        "--trusted-entities", type=Path, help="run only apps signed by one of these: Flower's file of public keys"
    )
    p.add_argument("--root-certificates", type=Path, help="certificates that the server's is checked with (PEM)")
    p.add_argument(
        "--insecure", action="store_true", help="without TLS: only where nobody else can listen or answer in between"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command until it is ended; returns the exit status: 1 failed, 2 wrong command line, 130 ended."""
    p = parser()
    args = p.parse_args(argv)
    if args.insecure and args.root_certificates is not None:
        p.error("--insecure checks no certificates; leave it out, or --root-certificates")
    try:
        place = _place(args)
    except ValueError as err:
        p.error(str(err))
    try:
        require_flower()
        if args.trust is not None:
            require_signed(args.artifact, args.trust)
        device = open_device(place)
        print(f"{len(device.training)} samples to train on, {len(device.held_out)} held out", file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a service manager, its SuperNode ends too
        stay(node_command(args, place))
    except LoracDeployError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ended; the same command joins again", file=sys.stderr)
    return INTERRUPTED


def node_command(args: argparse.Namespace, place: Place) -> list[str]:
    """Flower's command for this device. Raises EngineError if it is not beside this Python."""
    program = Path(sys.executable).parent / "flower-supernode"
    if not program.is_file():
        raise EngineError(f"{program} not found: install Flower into the environment that lorac-join runs in")
    tls = ["--insecure"] if args.insecure else []
    tls += ["--root-certificates", str(args.root_certificates)] if args.root_certificates else []
    tls += ["--trusted-entities", str(args.trusted_entities)] if args.trusted_entities else []
    own = ["--host", LOCAL, "--port", str(_free_port())]  # its service for the processes that it starts
    return [str(program), *tls, "--superlink", args.server, *own, "--node-config", node_text(place)]


def node_text(place: Place) -> str:
    """A place as Flower's command line takes it: key="value" pairs.

    >>> node_text(Place(Path("a"), Path("b c.npz"), Path("o"), name="hall")).split(" out=")[0].endswith('b c.npz"')
    True

    Raises ValueError for a path with a quotation mark, which Flower could not read back.
    """
    values = node_config(place)
    bad = [name for name, value in values.items() if isinstance(value, str) and ('"' in value or "\\" in value)]
    if bad:
        raise ValueError(f"{', '.join(bad)}: quotation marks and backslashes cannot be handed on to Flower")
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def node_config(place: Place) -> dict[str, str | int | float]:
    """A place as the configuration of a Flower node; `lorac_runtime.fleet.client.place_of` reads it."""
    found: dict[str, str | int | float] = {
        "artifact": str(place.artifact.resolve()),
        "data": str(place.data.resolve()),
        "out": str(place.out.resolve()),
        "val-fraction": place.val_fraction,
        "engine": place.engine,
        "name": place.name,
    }
    found |= {} if place.test is None else {"test": str(place.test.resolve())}
    return found | ({} if place.threads is None else {"threads": place.threads})


def stay(command: list[str], *, brief: float = BRIEF, pause: float = PAUSE) -> None:
    """Run Flower's SuperNode, and another one whenever it ends, as it does when the server was started anew.

    Raises EngineError if it ends `ATTEMPTS` times in a row within ``brief`` seconds: then it never worked.
    """
    early = 0
    while early < ATTEMPTS:
        started = time.monotonic()
        with leashed(command, _environment()) as node:
            status = node.wait()
        early = early + 1 if time.monotonic() - started < brief else 0
        print(f"Flower's SuperNode ended (status {status}); joining again", file=sys.stderr)
        time.sleep(pause)
    raise EngineError(f"Flower's SuperNode ended {ATTEMPTS} times right after its start; its own words stand above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def _place(args: argparse.Namespace) -> Place:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads must be at least 1, got {args.threads}")
    if args.test is not None and args.val_fraction is not None:
        raise ValueError("with --test nothing is held out of --data; leave --val-fraction out")
    fraction = args.val_fraction if args.val_fraction is not None else (0.0 if args.test else Place.val_fraction)
    place = Place(args.artifact, args.data, args.out, args.test, fraction, args.engine, args.threads, args.name)
    node_text(place)
    return place


def _environment() -> dict[str, str]:
    """This environment, with its own programs first: a SuperNode starts others by name."""
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")])}
