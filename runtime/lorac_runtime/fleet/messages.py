"""Orders, tensors and answers as Flower's records, the same on both sides."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorac_runtime.errors import AdapterError, EngineError
from lorac_runtime.fleet.device import Order
from lorac_runtime.schema import decode

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

FILE = "adapter.safetensors"
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
    """Tensors as one array: the bytes of a safetensors file, which holds their names.

    Flower sends each array in requests of its own. For 38 small tensors of 30 kB these took another 130 kB.
    """
    from flwr.app import Array, ArrayRecord

    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return ArrayRecord({FILE: Array(np.frombuffer(save(whole), np.uint8))})


def tensors_in(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    """The tensors in what came. Raises AdapterError if it is anything but what `array_record` makes."""
    records = list(content.array_records.values())
    if len(records) != 1 or list(records[0]) != [FILE]:
        found = [list(record) for record in records]
        raise AdapterError(f"expected one array {FILE} with all tensors, got {found}")
    try:
        packed = records[0][FILE].numpy()
        if packed.dtype != np.uint8:
            raise AdapterError(f"{FILE} is {packed.dtype}, expected the bytes of a safetensors file, uint8")
        return load(packed.tobytes())
    except (TypeError, ValueError, EOFError, OSError, KeyError, AttributeError, SafetensorError) as err:
        raise AdapterError(f"the tensors cannot be read ({err})") from err


def nbytes(record: ArrayRecord) -> int:
    """Bytes of the tensors as Flower serializes them, names and headers included; it adds some for the message."""
    return sum(len(array.data) for array in record.values())
