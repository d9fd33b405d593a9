"""Orders, tensors and answers as Flower's records, the same on both sides."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import AdapterError, EngineError
from lorac_runtime.fleet.device import Order
from lorac_runtime.schema import decode

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # Flower's own strategies call them so
SAMPLES = "num-examples"
ACTION, EVALUATE, ADOPT = "action", "evaluate", "adopt"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # Flower reports to its makers otherwise


def require_flower() -> None:
    """Turn Flower's telemetry and its search for updates off, unless the environment says otherwise.

    Raises EngineError with the pip command if Flower is missing. Has to be called before flwr is imported.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("flwr") is None:
        raise EngineError(
            'a fleet needs Flower, which is not installed here: pip install "lorac-runtime[fleet]" on a device, '
            '"lorac-deploy[fleet]" on the server (Python 3.11 or newer)'
        )


def order_record(order: Order) -> ConfigRecord:
    """An order as the server sends it; what is None is left out."""
    from flwr.app import ConfigRecord

    return ConfigRecord({name: value for name, value in dataclasses.asdict(order).items() if value is not None})


def read_order(record: Mapping[str, Any]) -> Order:
    """The order in what came. Raises AdapterError listing what is missing, unknown or of another type."""
    problems: list[str] = []
    order = decode(Order, {name: value for name, value in record.items() if name != ACTION}, "", problems)
    if problems:
        raise AdapterError("the server's order is not one of this version: " + "; ".join(problems))
    return cast(Order, order)


def array_record(tensors: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Tensors under their names."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in tensors.items()})


def tensors_in(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    """The tensors in what came. Raises AdapterError if there are none, or if they are no numpy arrays."""
    records = list(content.array_records.values())
    if len(records) != 1:
        raise AdapterError(f"expected one record of tensors, got {len(records)}")
    try:
        return {name: array.numpy() for name, array in records[0].items()}
    except (TypeError, ValueError, EOFError, OSError) as err:
        raise AdapterError(f"a tensor cannot be read ({err})") from err


def nbytes(record: ArrayRecord) -> int:
    """Bytes of the tensors as Flower serializes them, numpy's headers included; messages add names and identifiers."""
    return sum(len(array.data) for array in record.values())
