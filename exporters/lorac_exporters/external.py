"""Weights of step graphs that lie in another file: in base.onnx where they are the same, else in a file of their own.

ONNX calls this external data: a tensor of the graph names a file beside it, an offset and a length.
"""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, is_setting, name_of
from lorac_exporters.patch_table import initializer_offsets
from lorac_runtime.errors import OutputError

Array = npt.NDArray[np.generic]
WEIGHTS = "weights.bin"


def externalize(models: Mapping[str, ir.Model], base: Path, names: Container[str]) -> tuple[str, ...]:
    """Move the initializers called ``names`` out of ``models``, in place; returns what was written beside ``base``.

    A tensor that base.onnx holds under the same name and with the same numbers stays there; the others
    (BN policy ``batch`` trains unfolded weights, base.onnx holds folded ones) go to weights.bin, each once.

    Raises OutputError if that file cannot be written.
    """
    tensors = [v for model in models.values() for v in _parameters(model.graph, names)]
    places = _places_in(base, tensors)
    rest = {name_of(v): v for v in tensors if name_of(v) not in places}
    places |= _written(base.parent / WEIGHTS, rest)
    for value in tensors:
        location, offset = places[name_of(value)]
        value.const_value = _external(value, location, offset, base.parent)
    return (WEIGHTS,) if rest else ()


def external_names(model: ir.Model) -> list[str]:
    """The initializers of ``model`` that lie in another file."""
    return [n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)]


def _parameters(graph: ir.Graph, names: Container[str]) -> list[ir.Value]:
    """Float tensors; settings of operators stay in the graph."""
    chosen = (v for name, v in graph.initializers.items() if name in names)
    return [v for v in chosen if v.dtype == ir.DataType.FLOAT and not is_setting(v)]


def _places_in(base: Path, tensors: Iterable[ir.Value]) -> dict[str, tuple[str, int]]:
    offsets = initializer_offsets(base)
    with base.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {
            name: (base.name, offsets[name][0])
            for name, value in {name_of(v): v for v in tensors}.items()
            if name in offsets and _bytes(value) == content[offsets[name][0] : sum(offsets[name])]
        }


def _bytes(value: ir.Value) -> bytes:
    numbers = array(value)
    assert numbers is not None
    return np.ascontiguousarray(numbers).tobytes()


def _written(path: Path, tensors: Mapping[str, ir.Value]) -> dict[str, tuple[str, int]]:
    places, position = {}, 0
    for name, value in tensors.items():
        places[name] = (path.name, position)
        position += len(_bytes(value))
    if places:
        try:
            path.write_bytes(b"".join(_bytes(value) for value in tensors.values()))
        except OSError as err:
            raise OutputError(f"{path} cannot be written: {err.strerror}") from err
    return places


def _external(value: ir.Value, location: str, offset: int, folder: Path) -> ir.ExternalTensor:
    numbers = array(value)
    assert numbers is not None
    return ir.ExternalTensor(
        location,
        offset,
        numbers.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape(numbers.shape),
        name=name_of(value),
        base_dir=str(folder),
    )
