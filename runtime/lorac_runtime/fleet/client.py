"""The device as a Flower ClientApp: answers training and evaluation messages from a `Device`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorac_runtime.engines import AUTO
from lorac_runtime.errors import AdapterError, DataError, LoracDeployError
from lorac_runtime.fleet.device import Device, Order, Place, Trained, open_device
from lorac_runtime.fleet.messages import (
    ACTION,
    ADOPT,
    ARRAYS,
    CONFIG,
    METRICS,
    SAMPLES,
    array_record,
    read_order,
    require_flower,
    tensors_in,
)
from lorac_runtime.training import Evaluation

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

FAILED = 1  # code of an error reply; the reason is what counts
PRIVATE = "local data cannot be used; the device's own log says why"
log = logging.getLogger(__name__)
Answer = Callable[[Device, "RecordDict", Order], "RecordDict"]


def client_app() -> ClientApp:
    """A ClientApp whose node configuration names ``artifact``, ``data`` and ``out``, and perhaps the other fields of
    `Place`. What goes wrong is answered as an error in words, without anything of the local data.

    Raises EngineError if Flower is missing.
    """
    require_flower()
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, context, _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answered(message, context, _evaluate)

    return app


def answered(message: Message, context: Context, answer: Answer) -> Message:
    """The reply to a message: what ``answer`` makes of it, or an error that says why not."""
    from flwr.app import Error, Message

    try:
        device = open_device(place_of(context.node_config))
        order = _order(message.content)
        return Message(answer(device, message.content, order), reply_to=message)
    except (LoracDeployError, OSError, MemoryError) as err:
        log.error("round not answered: %s", err)
        return Message(Error(FAILED, _said(err)), reply_to=message)


def place_of(node: Mapping[str, Any]) -> Place:
    """Where a node's configuration says that artifact, data and folder are. Raises AdapterError for what it lacks."""
    missing = [name for name in ("artifact", "data", "out") if not node.get(name)]
    if missing:
        raise AdapterError(f"the node's configuration lacks {', '.join(missing)}: start it with lorac-join")
    return Place(
        artifact=Path(node["artifact"]),
        data=Path(node["data"]),
        out=Path(node["out"]),
        test=Path(node["test"]) if node.get("test") else None,
        val_fraction=float(node.get("val-fraction", Place.val_fraction)),
        engine=str(node.get("engine", AUTO)),
        threads=int(node["threads"]) if node.get("threads") else None,
        name=str(node.get("name", "")),
    )


def _order(content: RecordDict) -> Order:
    records = list(content.config_records.values())
    if len(records) != 1:
        raise AdapterError(f"expected one record with an order, got {len(records)}")
    return read_order(records[0])


def _train(device: Device, content: RecordDict, order: Order) -> RecordDict:
    from flwr.app import RecordDict

    done = device.train(tensors_in(content), order)
    answer = {ARRAYS: array_record(done.tensors), METRICS: _metrics(_figures(done)), CONFIG: _sender(device)}
    return RecordDict(answer)


def _figures(done: Trained) -> dict[str, int | float]:
    found: dict[str, int | float] = {SAMPLES: done.samples, "loss": done.loss}
    return found | ({} if done.before is None else _evaluated(done.before))


def _evaluate(device: Device, content: RecordDict, order: Order) -> RecordDict:
    """Evaluate what came; where the server says that it is the last, keep it and fuse it too."""
    from flwr.app import RecordDict

    tensors, held = tensors_in(content), len(device.held_out)
    figures: dict[str, int | float] = {SAMPLES: held or len(device.training)}
    if held:
        figures |= _evaluated(device.evaluate(tensors, order))
    if content.config_records[CONFIG].get(ACTION) == ADOPT:
        base = device.base()
        figures |= {} if base is None else {f"base-{name}": value for name, value in _evaluated(base).items()}
        device.adopt(tensors, order)
    return RecordDict({METRICS: _metrics(figures), CONFIG: _sender(device)})


def _evaluated(found: Evaluation) -> dict[str, int | float]:
    accuracy = {} if found.accuracy is None else {"accuracy": found.accuracy}
    return {"held-out-loss": found.loss, **accuracy}


def _metrics(figures: Mapping[str, int | float]) -> Any:
    from flwr.app import MetricRecord

    return MetricRecord(dict(figures))


def _sender(device: Device) -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord({"artifact": device.digest, "client": device.place.name})


def _said(err: BaseException) -> str:
    """What the server may know: messages about data could tell something of them, and others name local paths."""
    if isinstance(err, DataError):
        return PRIVATE
    return str(err) if isinstance(err, LoracDeployError) else type(err).__name__
