"""The rounds of a fleet, one after the other, each written down before the next begins."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorac_deploy.fleet.server_state import (
    ClientRound,
    RoundRecord,
    ServerState,
    adapter_of,
    read_state,
    write_state,
)
from lorac_deploy.fleet.strategy import AdapterFedAvg, FleetRules, Outcome
from lorac_runtime.errors import FleetError
from lorac_runtime.files import atomic_write, locked, output_folder
from lorac_runtime.fleet.payload import Tensors
from lorac_runtime.manifest import ADAPTER

if TYPE_CHECKING:
    from pathlib import Path

    from flwr.app import Message
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)
OnRound = Callable[[ServerState, Outcome], None]


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """How a fleet runs. A round waits ``timeout`` seconds for answers, and needs ``min_clients`` that count; one that
    has fewer is tried again, ``patience`` times in a row. ``wait`` seconds are given to clients to connect: as many as
    a round needs, and before the first one ``connect``, if that is given.
    """

    rounds: int = 10
    min_clients: int = 2
    fraction: float = 1.0
    timeout: float = 600.0
    wait: float = 600.0
    patience: int = 3
    connect: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "min_clients", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is a share of the clients, above 0 and at most 1, got {self.fraction}")
        for name in ("timeout", "wait"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a client says of the last adapter: its figures, or why there are none."""

    client: str
    figures: dict[str, float]
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class Learned:
    """What came of it: the whole ``state`` that was learned, the history, and what each client says of it."""

    tensors: Tensors
    history: ServerState
    clients: tuple[Evaluated, ...]


def run_rounds(
    grid: Grid, rules: FleetRules, out: Path, config: FleetConfig, *, on_round: OnRound | None = None
) -> Learned:
    """All rounds that are left, and then the clients' own evaluation; ``out`` gets adapter.safetensors.

    The same call goes on where one was killed, after the last whole round; with more rounds a finished one goes on too.

    Raises FleetError if too few clients connect or answer: what was learned so far stays in ``out``. CheckpointError if
    ``out`` holds a fleet with other settings, BusyError if another process works there, ArtifactError, OutputError.
    """
    strategy = AdapterFedAvg(rules, min_train_nodes=config.min_clients, fraction_train=config.fraction)
    with locked(output_folder(out)):
        state = read_state(out, identity(strategy))
        tensors = adapter_of(out, state, strategy.manifest) or strategy.start_state
        if state.done:
            log.info("going on after round %d", state.done)
        if state.done < config.rounds:
            await_clients(grid, config.connect or config.min_clients, config.wait)
        while state.done < config.rounds:
            outcome, tensors = _round(strategy, grid, tensors, state.done + 1, config)
            state = write_state(out, state, _recorded(outcome), tensors, strategy.metadata)
            if on_round is not None:
                on_round(state, outcome)
        atomic_write(out / ADAPTER, (out / state.adapter).read_bytes())
        return Learned(tensors, state, _evaluated(strategy, grid, tensors, config))


def identity(strategy: AdapterFedAvg) -> dict[str, str]:
    """What makes a fleet, as text: rounds may be added later, but not counted by other rules."""
    fields = dataclasses.asdict(strategy.rules)
    return {"artifact": strategy.digest, **{n: str(v) for n, v in fields.items() if n != "artifact"}}


def await_clients(grid: Grid, least: int, seconds: float) -> int:
    """How many clients are connected, as soon as there are enough. Raises FleetError if that takes too long."""
    ends = time.monotonic() + seconds
    while (there := len(list(grid.get_node_ids()))) < least:
        if time.monotonic() >= ends:
            raise FleetError(
                f"{there} of {least} clients connected within {seconds:g} s. What was learned so far is kept: start "
                "more clients and give the same command again, or ask for fewer (--min-clients)"
            )
        time.sleep(min(1.0, max(0.05, ends - time.monotonic())))
    return there


def _round(
    strategy: AdapterFedAvg, grid: Grid, tensors: Tensors, number: int, config: FleetConfig
) -> tuple[Outcome, Tensors]:
    """One round that counts. Raises FleetError after ``patience`` that do not."""
    from flwr.app import ConfigRecord

    strategy.first_round = number
    arrays = strategy.record(tensors)
    for attempt in range(1, config.patience + 1):
        await_clients(grid, config.min_clients, config.wait)
        messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=config.timeout)
        found, _ = strategy.aggregate_train(1, replies)
        outcome = strategy.outcome
        if found is not None and outcome is not None:
            return outcome, strategy.state(found)
        log.warning("round %d, attempt %d: %s", number, attempt, _too_few(outcome, config))
    raise FleetError(
        f"round {number} failed {config.patience} times: {_too_few(strategy.outcome, config)}. The adapter of round "
        f"{number - 1} is kept; the same command tries again"
    )


def _too_few(outcome: Outcome | None, config: FleetConfig) -> str:
    if outcome is None:
        return "nobody was asked"
    reasons = [str(one) for one in (*outcome.rejected, *outcome.failed)]
    reasons += [f"{outcome.silent} gave no answer within {config.timeout:g} s"] if outcome.silent else []
    return f"{len(outcome.updates)} of {config.min_clients} updates that are needed ({'; '.join(reasons)})"


def _recorded(outcome: Outcome) -> RoundRecord:
    clients = tuple(ClientRound(u.client, u.weight, u.norm, dict(u.figures)) for u in outcome.updates)
    refused = [f"rejected {one}" for one in outcome.rejected] + [f"failed {one}" for one in outcome.failed]
    return RoundRecord(
        round=outcome.round,
        asked=outcome.asked,
        clients=clients,
        refused=tuple(refused),
        silent=outcome.silent,
        down=outcome.down,
        up=outcome.up,
        error=max(outcome.errors.values(), default=0.0),
    )


def _evaluated(strategy: AdapterFedAvg, grid: Grid, tensors: Tensors, config: FleetConfig) -> tuple[Evaluated, ...]:
    """What each client says of the last adapter, which it keeps and fuses."""
    messages = strategy.ask_last(strategy.record(tensors), grid, adopt=True)
    replies = list(grid.send_and_receive(messages, timeout=config.timeout))
    if len(replies) < len(messages):
        log.warning(
            "%d of %d clients gave no answer about the last adapter", len(messages) - len(replies), len(messages)
        )
    return tuple(_figures(reply) for reply in replies)


def _figures(reply: Message) -> Evaluated:
    name = f"node {reply.metadata.src_node_id}"
    if reply.has_error():
        return Evaluated(name, {}, reply.error.reason or f"error {reply.error.code}")
    said: dict[str, Any] = dict(next(iter(reply.content.config_records.values()), {}))
    given: dict[str, Any] = dict(next(iter(reply.content.metric_records.values()), {}))
    figures = {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
    return Evaluated(str(said.get("client") or name), figures)
