"""Whole fleets in one process: what they learn, what travels, and what happens when clients and servers fail."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet_cases
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from lorac_deploy.commands.federate import main, parser
from lorac_deploy.fleet.averaging import averaged
from lorac_deploy.fleet.local_grid import LocalGrid
from lorac_deploy.fleet.rounds import FleetConfig, Learned, run_rounds
from lorac_deploy.fleet.simulation import clients_in, simulate
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules
from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import AdapterError, BusyError, CheckpointError, DataError, FleetError
from lorac_runtime.files import locked
from lorac_runtime.fleet import join
from lorac_runtime.fleet.client import client_app
from lorac_runtime.fleet.device import Order, Place, open_device
from lorac_runtime.fleet.join import node_config
from lorac_runtime.fleet.messages import array_record, nbytes, tensors_in
from lorac_runtime.manifest import load

App = Callable[[Message, Context], Message]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact and the data of four clients."""
    folder = tmp_path_factory.mktemp("fleet")
    fleet_cases.export(folder / "artifact")
    fleet_cases.write_clients(folder / "clients", 4)
    return folder


def place(home: Path, out: Path, number: int) -> Place:
    data = home / "clients" / f"cam{number}"
    name = f"cam{number}"
    return Place(home / "artifact", data / "local.npz", out / name, data / "test.npz", 0.0, threads=1, name=name)


def run(home: Path, out: Path, app: App | None = None, *, count: int = 4, **given: Any) -> Learned:
    """A fleet of some of the clients; ``given`` are fields of `FleetRules` and `FleetConfig`."""
    fields = {f.name for f in dataclasses.fields(FleetRules)}
    rules = FleetRules(home / "artifact", **{k: v for k, v in given.items() if k in fields})
    config = FleetConfig(**{"rounds": 1, "wait": 0.5, **{k: v for k, v in given.items() if k not in fields}})
    with LocalGrid(app or client_app(), [node_config(place(home, out, i)) for i in range(count)]) as grid:
        return run_rounds(grid, rules, out / "server", config)


def test_the_server_learns_the_mean_of_what_its_clients_would_alone(home: Path, tmp_path: Path) -> None:
    learned = run(home, tmp_path, epochs=2, lr=0.01)
    strategy = AdapterFedAvg(FleetRules(home / "artifact"))
    before, order = strategy.start_state, Order(strategy.digest, 1, epochs=2, lr=0.01)
    sent = {name: before[name] for name in strategy.payload.shapes}
    trained = [open_device(place(home, tmp_path / "alone", i)).train(sent, order) for i in range(4)]
    states = [{**before, **one.tensors} for one in trained]
    mean = averaged(strategy.manifest, states, [one.samples for one in trained], before).state
    fleet_cases.assert_same(strategy.manifest, learned.tensors, {**before, **mean})
    assert np.abs(mean["3.lora_b"]).max() > 1e-3


def test_a_fleet_improves_and_every_client_ends_with_a_fused_file(home: Path, tmp_path: Path) -> None:
    rules = FleetRules(home / "artifact", epochs=10, lr=0.02)
    report = simulate(rules, clients_in(home / "clients"), tmp_path, FleetConfig(rounds=4))
    for client in report.clients:
        assert client.failed == ""
        assert client.federated is not None
        assert client.base is not None
        assert client.federated >= client.base
        assert (tmp_path / "clients" / client.client / "fused.onnx").is_file()
    means = [np.mean([getattr(c, name) for c in report.clients]) for name in ("base", "federated")]
    assert means[1] > means[0] + 0.2
    assert json.loads((tmp_path / "fleet.json").read_text())["share"] == pytest.approx(report.share)


def test_nothing_but_adapters_and_a_few_numbers_leaves_a_client(home: Path, tmp_path: Path) -> None:
    replies: list[Message] = []
    inner = client_app()

    def watched(message: Message, context: Context) -> Message:
        replies.append(inner(message, context))
        return replies[-1]

    run(home, tmp_path, watched, count=2)
    manifest = load(home / "artifact")
    allowed = {"num-examples", "loss", "held-out-loss", "accuracy", "base-held-out-loss", "base-accuracy"}
    assert len(replies) == 4
    for reply in replies:
        if reply.content.array_records:
            sent = tensors_in(reply.content)
            assert {n: value.shape for n, value in sent.items()} == {t.name: t.shape for t in manifest.trainables}
            assert nbytes(reply.content.array_records["arrays"]) < 4 * manifest.trained_parameters + 1000
        for metrics in reply.content.metric_records.values():
            assert set(metrics) <= allowed
            assert all(isinstance(value, int | float) for value in metrics.values())
        for config in reply.content.config_records.values():
            assert set(config) == {"artifact", "client"}


def test_personal_heads_stay_and_differ(home: Path, tmp_path: Path) -> None:
    learned = run(home, tmp_path, rounds=2, epochs=2, lr=0.02, personal="head", count=2)
    heads = [load_adapter(tmp_path / f"cam{i}" / "personal.safetensors").tensors["7.weight"] for i in range(2)]
    start = AdapterFedAvg(FleetRules(home / "artifact")).start_state["7.weight"]
    assert np.array_equal(learned.tensors["7.weight"], start)
    assert not np.array_equal(heads[0], heads[1])
    for i, head in enumerate(heads):
        kept = load_adapter(tmp_path / f"cam{i}" / "adapter.safetensors").tensors
        assert np.array_equal(kept["7.weight"], head)
        assert np.array_equal(kept["3.lora_b"], learned.tensors["3.lora_b"])


def spoiled(spoil: Callable[[dict[str, np.ndarray[Any, Any]]], None], name: str = "cam3") -> App:
    """The usual app, but one client's tensors are changed before they are sent."""
    inner = client_app()

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_config["name"] == name and reply.has_content() and reply.content.array_records:
            tensors = tensors_in(reply.content)
            spoil(tensors)
            reply.content = RecordDict({**dict(reply.content.items()), "arrays": array_record(tensors)})
        return reply

    return app


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_a_malicious_client_changes_nothing_of_what_the_others_learn(home: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["3.lora_b"][:] = value

    learned = run(home, tmp_path / "with", spoiled(spoil), min_clients=3)
    honest = run(home, tmp_path / "without", count=3, min_clients=3)
    [record] = learned.history.rounds
    assert [line.split(":")[0] for line in record.refused] == ["rejected cam3 (node 5)"]
    fleet_cases.assert_same(load(home / "artifact"), learned.tensors, honest.tensors)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "got [[]]"),
        ({"3.lora_b": np.zeros(2, np.float32)}, "got [['3.lora_b']]"),
        ({"adapter.safetensors": np.zeros(9, np.uint8)}, "the tensors cannot be read"),
        ({"adapter.safetensors": np.zeros(9, np.float32)}, "is float32, expected the bytes"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused_in_words(arrays: dict[str, Any], said: str) -> None:
    content = RecordDict({"arrays": ArrayRecord({name: Array(value) for name, value in arrays.items()})})
    with pytest.raises(AdapterError) as refused:
        tensors_in(content)
    assert said in str(refused.value)


def failing(names: set[str], *, error: bool) -> App:
    """The usual app, but some clients answer with an error, or nothing in time."""
    inner, never = client_app(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        if context.node_config["name"] in names:
            if error:
                return Message(Error(1, "the camera is unplugged"), reply_to=message)
            never.wait(2)
        return inner(message, context)

    return app


def test_clients_that_vanish_are_named_or_counted_and_the_round_goes_on(home: Path, tmp_path: Path) -> None:
    learned = run(home, tmp_path, failing({"cam0"}, error=True))
    [record] = learned.history.rounds
    assert record.refused == ("failed node 2: the camera is unplugged",)
    assert [c.client.split()[0] for c in record.clients] == ["cam1", "cam2", "cam3"]
    assert [c.failed for c in learned.clients if c.failed] == ["the camera is unplugged"]


def test_a_straggler_is_left_out(home: Path, tmp_path: Path) -> None:
    warm = run(home, tmp_path / "warm", count=2)  # the engine is loaded: a round now takes much less than a second
    assert warm.history.done == 1
    learned = run(home, tmp_path / "late", failing({"cam1"}, error=False), count=2, min_clients=1, timeout=1.2)
    [record] = learned.history.rounds
    assert record.silent == 1
    assert [c.client.split()[0] for c in record.clients] == ["cam0"]


def test_too_few_answers_end_the_fleet_in_words_and_nothing_is_lost(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path)
    before = (tmp_path / "server" / "state.json").read_bytes()
    everybody = {f"cam{i}" for i in range(4)}
    with pytest.raises(
        FleetError, match=r"(?s)round 2 failed 3 times: 0 of 2 updates .* round 1 is kept; the same command"
    ):
        run(home, tmp_path, failing(everybody, error=True), rounds=2)
    assert (tmp_path / "server" / "state.json").read_bytes() == before
    assert run(home, tmp_path, rounds=2).history.done == 2


def test_too_few_clients_are_waited_for_only_so_long(home: Path, tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"2 of 3 clients connected within 0\.5 s"):
        run(home, tmp_path, count=2, min_clients=3)


def test_a_client_with_another_artifact_is_refused_by_both_sides(home: Path, tmp_path: Path) -> None:
    other = fleet_cases.export(tmp_path / "other", method="head")
    nodes = [node_config(place(home, tmp_path, i)) for i in range(3)]
    nodes[2]["artifact"] = str(other)
    rules, config = FleetRules(home / "artifact"), FleetConfig(rounds=1)
    with LocalGrid(client_app(), nodes) as grid:
        learned = run_rounds(grid, rules, tmp_path / "server", config)
    [record] = learned.history.rounds
    assert len(record.clients) == 2
    assert "the fleet trains another artifact" in record.refused[0]


class Killed(BaseException):
    """The server dies."""


def test_a_server_that_was_killed_goes_on_after_the_last_whole_round(home: Path, tmp_path: Path) -> None:
    inner, seen = client_app(), []

    def dying(message: Message, context: Context) -> Message:
        seen.append(message)
        if len(seen) == 4:  # in the second round
            raise Killed
        return inner(message, context)

    with pytest.raises(Killed):
        run(home, tmp_path / "cut", dying, rounds=3, personal="head", count=2)
    assert json.loads((tmp_path / "cut" / "server" / "state.json").read_text())["rounds"][-1]["round"] == 1
    again = run(home, tmp_path / "cut", rounds=3, personal="head", count=2)
    assert [r.round for r in again.history.rounds] == [1, 2, 3]
    names = sorted(p.name for p in (tmp_path / "cut" / "server").glob("*.safetensors"))
    assert names == ["adapter.safetensors", "round-00003.safetensors"]
    assert np.array_equal(
        load_adapter(tmp_path / "cut" / "server" / names[0]).tensors["3.lora_b"], again.tensors["3.lora_b"]
    )


def test_a_fleet_that_goes_on_learns_what_it_would_have_learned_at_once(home: Path, tmp_path: Path) -> None:
    whole = run(home, tmp_path / "whole", rounds=2, count=2)
    run(home, tmp_path / "cut", rounds=1, count=2)
    cut = run(home, tmp_path / "cut", rounds=2, count=2)
    fleet_cases.assert_same(load(home / "artifact"), cut.tensors, whole.tensors)
    kept = load_adapter(tmp_path / "cut" / "server" / "adapter.safetensors").tensors
    assert all(np.array_equal(kept[name], value) for name, value in cut.tensors.items())


def test_other_settings_a_damaged_adapter_and_a_busy_folder_are_refused(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path, count=2)
    with pytest.raises(CheckpointError, match=r"(?s)other settings.*epochs: '1' before, '2' now"):
        run(home, tmp_path, count=2, epochs=2)
    with locked(tmp_path / "server"), pytest.raises(BusyError):
        run(home, tmp_path, count=2)
    (tmp_path / "server" / "round-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="missing or was altered"):
        run(home, tmp_path, count=2, rounds=2)


def test_a_folder_without_clients_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no local\.npz"):
        clients_in(tmp_path)
    with pytest.raises(DataError, match="holds 4 clients, expected at least 5"):
        clients_in(home / "clients", 5)
    with pytest.raises(DataError, match="4 clients can give no 5 answers"):
        simulate(FleetRules(home / "artifact"), clients_in(home / "clients"), tmp_path, FleetConfig(min_clients=5))


def test_the_command_prints_each_client_and_what_travels(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(home / "artifact"), "--data-dir", str(home / "clients"), "--clients", "2", "--rounds", "1"]
    words += ["--out", str(tmp_path / "out"), "--plot", str(tmp_path / "fleet.png"), "--payload", "float16"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "cam0" in printed
    assert "cam2" not in printed
    assert "of sending the model" in printed
    assert (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")


def documented(root: Path) -> list[list[str]]:
    """The commands of docs/fleet.md, word by word."""
    page = (root / "docs" / "fleet.md").read_text(encoding="utf-8")
    text = "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def test_the_documented_commands_are_right_and_the_simulation_runs_as_written(
    home: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "artifact").symlink_to(home / "artifact")
    (tmp_path / "clients").symlink_to(home / "clients")
    monkeypatch.chdir(tmp_path)
    simulated, served, joined = documented(root)
    assert (simulated[:2], served[:2], joined[0]) == (
        ["lorac-deploy", "federate"],
        ["lorac-deploy", "federate"],
        "lorac-join",
    )
    assert main(simulated[2:]) == 0
    assert "federated %" in capsys.readouterr().out
    assert (tmp_path / "fleet.png").is_file()
    assert parser().parse_args(served[2:]).clients == 5
    assert join.parser().parse_args(joined[1:]).server == "cloud.example.org:9092"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-dir", "c", "--wait", "3"], "--wait would change nothing with --data-dir"),
        (["--server", "h:1", "--workers", "3"], "--workers would change nothing with --server"),
        (["--data-dir", "c", "--clients", "1"], "1 clients can give no 2 answers"),
        (["--data-dir", "c", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--server", "here"], "'here' is not HOST:PORT"),
        (["--server", "h:1", "--key", "k"], "TLS needs all three"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["artifact", "--out", "o", *words])
    assert said in capsys.readouterr().err
