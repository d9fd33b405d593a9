"""A Flower strategy for adapters: like FedAvg, with the mean taken of changes of weights, and answers that are checked.

It works in any Flower ServerApp, beside the ClientApp of `lorac_runtime.fleet.client`:

    strategy = AdapterFedAvg(FleetRules(Path("artifact"), epochs=2), min_train_nodes=3)
    strategy.start(grid, strategy.initial_arrays(), num_rounds=10)
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterable
from pathlib import Path

from lorac_deploy.fleet.averaging import averaged
from lorac_deploy.fleet.judging import Answer, Judge, Rejected, Update
from lorac_runtime.errors import AdapterError
from lorac_runtime.fleet.device import Order
from lorac_runtime.fleet.messages import (
    ACTION,
    ADOPT,
    ARRAYS,
    CONFIG,
    EVALUATE,
    SAMPLES,
    array_record,
    nbytes,
    order_record,
    require_flower,
    tensors_in,
)
from lorac_runtime.fleet.payload import Given, Tensors, from_wire, payload_of, to_wire
from lorac_runtime.job import start_of
from lorac_runtime.manifest import FILE_NAME, load, sha256
from lorac_runtime.tasks import require_classifier

require_flower()
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.serverapp.strategy import Strategy  # noqa: E402

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FleetRules:
    """What a fleet trains, and how. ``epochs`` are those of a device in a round; ``lr`` and ``batch_size`` None: the
    artifact's; ``personal`` and ``numbers`` as `payload_of` takes them; ``most_norm`` as `Judge` takes it.
    """

    artifact: Path
    epochs: int = 1
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0
    personal: str = "none"
    numbers: str = "float32"
    most_norm: float = 5.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A round: ``asked`` clients, the ``updates`` that counted, and the others by name: ``rejected``, ``failed`` (with
    their own words), and ``silent`` ones, of which nothing came in time (a number: Flower does not say their names).

    ``down`` and ``up`` are bytes of tensors to and from all clients. ``errors`` are those of keeping the mean by
    factors, by layer; {} if there were too few updates for one.
    """

    round: int
    asked: int
    updates: tuple[Update, ...]
    rejected: tuple[Rejected, ...]
    failed: tuple[Rejected, ...]
    silent: int
    down: int
    up: int
    errors: dict[str, float]


class AdapterFedAvg(Strategy):
    """Federated averaging of adapters. Raises ArtifactError if the artifact cannot be averaged (`payload_of`).

    ``min_train_nodes``: with fewer updates that count, the round changes nothing. ``first_round`` is the number of the
    first round of `start`, for one that goes on. ``outcome`` is the last round's.
    """

    def __init__(
        self, rules: FleetRules, *, min_train_nodes: int = 2, fraction_train: float = 1.0, first_round: int = 1
    ) -> None:
        if min_train_nodes < 1 or not 0 < fraction_train <= 1:
            raise ValueError(f"min_train_nodes {min_train_nodes} and fraction_train {fraction_train}: out of range")
        self.rules, self.least, self.fraction, self.first_round = rules, min_train_nodes, fraction_train, first_round
        self.manifest = load(rules.artifact)
        require_classifier(
            rules.artifact, self.manifest.task, "a fleet compares accuracies", "use `lorac-finetune` on each device"
        )
        self.digest = sha256(rules.artifact / FILE_NAME)
        self.payload = payload_of(self.manifest, personal=rules.personal, numbers=rules.numbers)
        self.start_state, self.metadata = start_of(rules.artifact, self.manifest)
        self.outcome: Outcome | None = None
        self._before: Tensors = self.start_state
        self._asked, self._down = 0, 0

    def summary(self) -> None:
        """Log what travels."""
        sizes = f"{len(self.payload.shapes)} tensors, {self.payload.nbytes:,} bytes each way"
        log.info("adapters of %s: %s; at least %d updates a round", self.manifest.model, sizes, self.least)

    def initial_arrays(self) -> ArrayRecord:
        """What the first round starts from: the artifact's own adapter."""
        return self.record(self.start_state)

    def record(self, state: Given) -> ArrayRecord:
        """A state as it travels."""
        return array_record(to_wire(self.payload, state))

    def state(self, arrays: ArrayRecord) -> Tensors:
        """What travelled as a whole state. Raises AdapterError if it does not fit."""
        tensors = tensors_in(RecordDict({ARRAYS: arrays}))
        return {**self.start_state, **from_wire(self.payload, tensors)}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to train; which ones, if not all, depends on seed and round alone. ``config`` is not sent on:
        the rules are the order.
        """
        del config
        number = self._number(server_round)
        nodes = sorted(grid.get_node_ids())
        wanted = min(len(nodes), max(self.least, round(self.fraction * len(nodes))))
        chosen = random.Random(self.rules.seed * 1_000_003 + number).sample(nodes, wanted)
        self._before = self.state(arrays)
        self._asked, self._down = wanted, wanted * nbytes(arrays)
        return self._messages(arrays, self._order(number), chosen, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of what counts, None if that is too little; who did not count stands in ``outcome`` and the log."""
        read = [_read(reply) for reply in replies]
        answers = [one for one in read if isinstance(one, Answer)]
        failed = [one for one in read if isinstance(one, Rejected)]
        judge = Judge(self.manifest, self.digest, self.payload, self._before, self.rules.most_norm)
        updates, rejected = judge.judged(answers)
        silent = self._asked - len(answers) - len(failed)
        for kind, who in (("rejected", rejected), ("failed", failed)):
            for one in who:
                log.warning("round %d: %s %s", self._number(server_round), kind, one)
        found, errors = self._mean(updates)
        self.outcome = Outcome(
            round=self._number(server_round),
            asked=self._asked,
            updates=tuple(updates),
            rejected=tuple(rejected),
            failed=tuple(failed),
            silent=silent,
            down=self._down,
            up=sum(answer.nbytes for answer in answers),
            errors=errors,
        )
        return found, None if found is None else _means(updates)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients evaluate what they get before they train. See `ask_last`."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nothing was asked."""
        del server_round, replies
        return None

    def ask_last(self, arrays: ArrayRecord, grid: Grid, *, adopt: bool) -> list[Message]:
        """Messages to all clients, to evaluate ``arrays``; with ``adopt`` to keep and fuse them too."""
        order = self._order(self.first_round)
        order[ACTION] = ADOPT if adopt else EVALUATE
        return self._messages(arrays, order, sorted(grid.get_node_ids()), MessageType.EVALUATE)

    def _number(self, server_round: int) -> int:
        return self.first_round + server_round - 1

    def _order(self, number: int) -> ConfigRecord:
        r = self.rules
        return order_record(
            Order(self.digest, number, r.epochs, r.lr, r.batch_size, r.seed, personal=r.personal, numbers=r.numbers)
        )

    def _messages(self, arrays: ArrayRecord, order: ConfigRecord, nodes: list[int], kind: str) -> list[Message]:
        content = RecordDict({ARRAYS: arrays, CONFIG: order})
        return [Message(content, message_type=kind, dst_node_id=node) for node in nodes]

    def _mean(self, updates: list[Update]) -> tuple[ArrayRecord | None, dict[str, float]]:
        if len(updates) < self.least:
            return None, {}
        states = [{**self._before, **update.tensors} for update in updates]
        found = averaged(self.manifest, states, [update.weight for update in updates], self._before)
        return self.record(found.state), found.errors


def _read(reply: Message) -> Answer | Rejected:
    """What a client answered, whatever it is; nothing of it is trusted yet."""
    name = f"node {reply.metadata.src_node_id}"
    if reply.has_error():
        return Rejected(name, (reply.error.reason or f"error {reply.error.code}",))
    content = reply.content
    said: dict[str, object] = dict(next(iter(content.config_records.values()), {}))
    figures = dict(next(iter(content.metric_records.values()), {}))
    name = f"{said['client']!s} ({name})" if said.get("client") else name
    try:
        tensors = tensors_in(content)
        samples = float(figures.pop(SAMPLES, 0))  # type: ignore[arg-type]
    except (AdapterError, TypeError, ValueError) as err:
        return Rejected(name, (str(err),))
    numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
    size = nbytes(next(iter(content.array_records.values())))
    return Answer(name, tensors, str(said.get("artifact", "")), samples, numbers, size)


def _means(updates: list[Update]) -> MetricRecord:
    """Means of the figures that all clients gave, weighted as their tensors were."""
    common = set.intersection(*(set(u.figures) for u in updates))
    total = sum(u.weight for u in updates)
    return MetricRecord({name: sum(u.weight * u.figures[name] for u in updates) / total for name in sorted(common)})
