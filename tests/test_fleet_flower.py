"""A fleet as its users run it: Flower's own processes on this machine, the commands that start them, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fleet_cases
import pytest

from lorac_deploy.fleet.averaging import averaged
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import EngineError
from lorac_runtime.fleet import join
from lorac_runtime.fleet.client import place_of
from lorac_runtime.fleet.device import Order, Place, open_device
from lorac_runtime.fleet.leash import leashed

PROGRAMS = Path(sys.executable).parent
SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, which is gone afterwards."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_two_devices_join_a_server_and_learn_what_the_formula_says(tmp_path: Path) -> None:
    artifact, data = fleet_cases.export(tmp_path / "artifact"), fleet_cases.write_clients(tmp_path / "clients", 2)
    port, out = free_port(), tmp_path / "fleet"
    serve = [
        str(PROGRAMS / "lorac-deploy"),
        "federate",
        str(artifact),
        "--server",
        f"127.0.0.1:{port}",
        "--out",
        str(out),
    ]
    serve += ["--rounds", "1", "--clients", "2", "--wait", str(SECONDS)]
    with contextlib.ExitStack() as held:
        server = held.enter_context(started(serve, tmp_path / "server.log"))
        for number in range(2):
            own = data / f"cam{number}"
            words = [str(artifact), "--server", f"127.0.0.1:{port}", "--insecure", "--data", str(own / "local.npz")]
            words += ["--test", str(own / "test.npz"), "--out", str(tmp_path / f"joined{number}"), "--name", own.name]
            held.enter_context(started([str(PROGRAMS / "lorac-join"), *words], tmp_path / f"{number}.log"))
        assert server.wait(SECONDS) == 0, (tmp_path / "server.log").read_text()
        assert not listens(port)  # Flower's processes are gone too
    printed = (tmp_path / "server.log").read_text()
    strategy = AdapterFedAvg(FleetRules(artifact))
    state, order = strategy.start_state, Order(strategy.digest, 1)
    sent = {name: state[name] for name in strategy.payload.shapes}
    trained = []
    for number in range(2):
        own, joined = data / f"cam{number}", tmp_path / f"joined{number}"
        trained.append(
            open_device(Place(artifact, own / "local.npz", tmp_path / "x", own / "test.npz")).train(sent, order)
        )
        assert (joined / "fused.onnx").is_file()
        assert own.name in printed
    expected = averaged(strategy.manifest, [{**state, **t.tensors} for t in trained], [1, 1], state).state
    learned = load_adapter(out / "adapter.safetensors").tensors
    fleet_cases.assert_same(strategy.manifest, learned, {**state, **expected})
    [record] = json.loads((out / "state.json").read_text())["rounds"]
    assert sorted(c["client"].split()[0] for c in record["clients"]) == ["cam0", "cam1"]


def test_what_is_on_the_leash_ends_with_whoever_holds_it(tmp_path: Path) -> None:
    port = free_port()
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    with leashed([sys.executable, "-c", code], os.environ):
        deadline = time.monotonic() + 60
        while not listens(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert listens(port)
    assert not listens(port)


def test_a_device_gives_up_if_its_node_never_worked() -> None:
    with pytest.raises(EngineError, match="ended 3 times right after its start"):
        join.stay([sys.executable, "-c", ""], brief=float("inf"), pause=0.0)


def test_a_device_joins_again_whenever_its_node_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == join.ATTEMPTS + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(join.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        join.stay([sys.executable, "-c", ""], brief=0.0, pause=7.0)
    assert pauses == [7.0] * (join.ATTEMPTS + 1)


def test_a_place_survives_the_way_through_flowers_command_line(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    place = Place(
        tmp_path / "a b", tmp_path / "día=1.npz", tmp_path / "o", tmp_path / "t.npz", 0.25, threads=3, name="Hall 7"
    )
    assert place_of(parse_config_args([join.node_text(place)])) == place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--insecure", "--root-certificates", "c"], "--insecure checks no certificates"),
        (["--test", "t", "--val-fraction", "0.1"], "leave --val-fraction out"),
        (["--val-fraction", "2"], "val_fraction must be at least 0 and below 1, got 2"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--name", 'a "b"'], "quotation marks and backslashes cannot be handed on"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        join.main(["artifact", "--server", "h:1", "--data", "d", "--out", "o", *words])
    assert said in capsys.readouterr().err


def test_a_device_without_data_says_so_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = fleet_cases.export(tmp_path / "artifact")
    words = [str(artifact), "--server", "h:1", "--data", str(tmp_path / "none.npz"), "--out", str(tmp_path / "o")]
    assert join.main(words) == 1
    assert "none.npz cannot be read" in capsys.readouterr().err
