"""A Grid whose nodes live in this process: Flower's messages, apps and strategies without its servers, and without ray.

For simulated fleets: every node has its own configuration and a Context that lasts, and answers in a thread.
"""

from __future__ import annotations

import concurrent.futures as cf
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorac_runtime.fleet.messages import require_flower

require_flower()
from flwr.app import Context, Message, RecordDict  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402  a Message cannot be made without (1.39)

App = Callable[[Message, Context], Message]
RUN = 1
SERVER = 1  # Flower's own number of the server; nodes count from FIRST
FIRST = 2


class LocalGrid(Grid):
    """``nodes``: a configuration for each client, as its ClientApp reads it; ``app`` answers for all of them.

    ``workers`` clients work at once. Node ids are `FIRST`, `FIRST` + 1, ... in the order given. Closed as a context.
    """

    def __init__(self, app: App, nodes: Iterable[Mapping[str, Any]], *, workers: int = 2) -> None:
        self._app = app
        self._contexts = {
            FIRST + i: Context(RUN, FIRST + i, dict(node), RecordDict(), {}) for i, node in enumerate(nodes)
        }
        self._pool = cf.ThreadPoolExecutor(workers)
        self._waiting: dict[str, cf.Future[Message]] = {}
        self._numbers = itertools.count(1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SERVER

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """Raises ValueError: nothing here asks for it."""
        raise ValueError("a LocalGrid has no run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, message_type=message_type, dst_node_id=dst_node_id, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """All of them: nodes of one process are never away."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand each message to its node."""
        found = []
        for message in messages:
            number = str(next(self._numbers))
            self._waiting[number] = self._pool.submit(self._answer, message)
            found.append(number)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there already; each is given once."""
        done = [number for number in message_ids if number in self._waiting and self._waiting[number].done()]
        return [self._waiting.pop(number).result() for number in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies that come within ``timeout`` seconds, in the order of the messages; later ones are forgotten."""
        started = time.monotonic()
        numbers = self.push_messages(messages)
        futures = [self._waiting[number] for number in numbers]
        cf.wait(futures, None if timeout is None else max(0.0, timeout - (time.monotonic() - started)))
        replies = self.pull_messages(numbers)
        for number in numbers:
            late = self._waiting.pop(number, None)
            if late is not None:
                late.cancel()
        return replies

    def _answer(self, message: Message) -> Message:
        return self._app(message, self._contexts[message.metadata.dst_node_id])
