"""A fleet of real devices: Flower's SuperLink in a process of its own, the app given to it, the outcome waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorac_deploy.fleet.flower_app import HOME, OUTCOME, SETTINGS, write_app
from lorac_deploy.fleet.rounds import FleetConfig
from lorac_deploy.fleet.server_state import FILE_NAME
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_runtime.errors import FleetError
from lorac_runtime.files import locked, output_folder
from lorac_runtime.fleet.leash import leashed

LOG = "superlink.log"
LOCAL = "127.0.0.1"
STARTS = 60.0  # seconds for the SuperLink to listen
OnProgress = Callable[[str, int, int | None], None]


@dataclasses.dataclass(frozen=True)
class Listening:
    """Where devices connect (``address``, HOST:PORT), and the files of TLS; without them nothing is encrypted."""

    address: str
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None

    def __post_init__(self) -> None:
        if not self.address.rpartition(":")[2].isdigit():
            raise ValueError(f"server {self.address!r} is not HOST:PORT, such as 0.0.0.0:9092")
        given = [file is not None for file in (self.certificate, self.key, self.authority)]
        if any(given) and not all(given):
            raise ValueError("TLS needs all three: --certificate, --key and --ca-certificate")


def serve(
    rules: FleetRules,
    listening: Listening,
    out: Path,
    config: FleetConfig,
    *,
    connect: int | None = None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Run a fleet of devices that connect; returns what they say of the last adapter, as `flower_app` wrote it.

    The first round waits for ``connect`` devices (None: for as many as a round needs).

    Raises FleetError in the server's words if the fleet failed, or if Flower's processes did; what was learned so far
    stays in ``out``, and the same call goes on. BusyError if another command does this in ``out``.
    """
    AdapterFedAvg(rules, min_train_nodes=config.min_clients)  # the artifact is checked before anything is started
    control = _free_port()
    with locked(output_folder(out / HOME)), _superlink(out, listening, control) as link:
        app = write_app(out, rules, dataclasses.replace(config, connect=connect))
        (out / OUTCOME).unlink(missing_ok=True)
        _write_home(out, control, listening)
        _await(lambda: _listens(control), link, out, STARTS)
        _submit(app, out)
        return _outcome(out, config, link, on_progress)


def _outcome(out: Path, config: FleetConfig, link: subprocess.Popen[bytes], told: OnProgress) -> dict[str, Any]:
    while not (out / OUTCOME).exists():
        told("rounds", _rounds_done(out), config.rounds)
        if link.poll() is not None:
            raise FleetError(f"Flower's SuperLink ended with status {link.returncode}; see {out / LOG}")
        time.sleep(0.5)
    outcome: dict[str, Any] = json.loads((out / OUTCOME).read_text(encoding="utf-8"))
    if outcome["error"]:
        raise FleetError(str(outcome["error"]))
    told("rounds", _rounds_done(out), config.rounds)
    return outcome


def _rounds_done(out: Path) -> int:
    path = out / FILE_NAME
    return len(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0


def _submit(app: Path, out: Path) -> None:
    """Give the app to the SuperLink. Raises FleetError with Flower's words if it takes it not."""
    settings = f'settings="{(out / SETTINGS).resolve()}"'
    command = [_program("flwr"), "run", str(app), "here", "--run-config", settings]
    done = subprocess.run(command, env=_environment(out), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FleetError(f"Flower does not take the app: {(done.stderr or done.stdout).strip()[-2000:]}")


@contextlib.contextmanager
def _superlink(out: Path, listening: Listening, control: int) -> Iterator[subprocess.Popen[bytes]]:
    """Flower's server, which ends with the block."""
    command = [_program("flower-superlink"), "--disable-runtime-dependency-installation"]
    command += ["--fleet-api-address", listening.address, "--host", LOCAL, "--port", str(control)]
    command += ["--insecure"] if listening.certificate is None else _tls(listening)
    with (out / LOG).open("ab") as log, leashed(command, _environment(out), log) as link:
        yield link


def _tls(listening: Listening) -> list[str]:
    files = {"certfile": listening.certificate, "keyfile": listening.key, "ca-certfile": listening.authority}
    return [word for name, file in files.items() for word in (f"--ssl-{name}", str(file))]


def _write_home(out: Path, control: int, listening: Listening) -> None:
    """Flower's configuration, in ``out`` instead of the user's own."""
    tls = "insecure = true" if listening.authority is None else f'root-certificates = "{listening.authority.resolve()}"'
    text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{LOCAL}:{control}"\n{tls}\n'
    (out / HOME / "config.toml").write_text(text, encoding="utf-8")


def _environment(out: Path) -> dict[str, str]:
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "FLWR_HOME": str((out / HOME).resolve())}


def _program(name: str) -> str:
    found = Path(sys.executable).parent / name
    if not found.is_file():
        raise FleetError(f"{found} not found: install Flower into this environment (lorac-deploy[fleet])")
    return str(found)


def _await(there: Callable[[], bool], link: subprocess.Popen[bytes], out: Path, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not there():
        if link.poll() is not None:
            raise FleetError(f"Flower's SuperLink did not start (status {link.returncode}); see {out / LOG}")
        if time.monotonic() > ends:
            raise FleetError(f"Flower's SuperLink did not listen within {seconds:g} s; see {out / LOG}")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOCAL, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])
