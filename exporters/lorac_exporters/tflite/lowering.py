"""The state while an ONNX graph is lowered to TFLite: which tensor holds which value, and in which order of axes.

ONNX keeps images as (N, C, H, W), TFLite as (N, H, W, C). Each value carries its layout: ``layout[i]`` is the ONNX
axis that lies at position i of the stored tensor. A Transpose in ONNX then costs nothing, it only renames axes; a
TRANSPOSE operator is written where an operator cannot work on the order that it finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, describe, name_of, need, static_dims, unique_name
from lorac_exporters.tflite.network import DType, Operator, Option, Source, Tensor
from lorac_runtime.errors import ConversionError

Array = npt.NDArray[Any]
Layout = tuple[int, ...]

# Lowers one node: reads `Lowering.stored` of its inputs, emits operators, and ends with `Lowering.bind` of each output.
# Raises ConversionError for a form of the operator that TFLite cannot do.
Rule = Callable[["Lowering", ir.Node], None]

DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
    ir.DataType.BOOL: "bool",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a value lies: ``tensor.shape[i]`` is the value's size along its ONNX axis ``layout[i]``."""

    tensor: Tensor
    layout: Layout


def channels_last(rank: int) -> Layout:
    """The layout of feature maps: batch, positions, channels; as it is where there are no positions.

    >>> channels_last(4), channels_last(3), channels_last(2)
    ((0, 2, 3, 1), (0, 2, 1), (0, 1))
    """
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def plain(rank: int) -> Layout:
    """The layout of ONNX itself.

    >>> plain(3)
    (0, 1, 2)
    """
    return tuple(range(rank))


class Lowering:
    """Collects the operators of a `Network`. ``taken`` names are kept apart from the names of new tensors."""

    def __init__(self, graph: ir.Graph, taken: set[str]) -> None:
        self.graph = graph
        self.operators: list[Operator] = []
        self._stored: dict[ir.Value, Stored] = {}
        self._constants: dict[ir.Value, dict[tuple[Layout, ...], Tensor]] = {}
        self._names = taken

    def dims(self, value: ir.Value | None) -> tuple[int, ...]:
        """ONNX shape of a value, 1 for the batch.

        Raises ConversionError if its rank is unknown, or a size other than the first is.
        """
        dims = static_dims(value)
        if dims is None or None in dims[1:]:
            found = None if value is None else value.shape
            raise ConversionError(f"{name_of(value)!r} has shape {found}: all sizes but the batch must be known")
        return tuple(1 if size is None else size for size in dims)

    def has_batch(self, value: ir.Value | None) -> bool:
        """Whether the first axis of a value is the free batch."""
        dims = static_dims(value)
        return bool(dims) and dims is not None and dims[0] is None

    def stored(self, value: ir.Value | None, layout: Layout | None = None) -> Stored:
        """Where a value lies. With ``layout``: in that order of axes, by a TRANSPOSE where it is not.

        A constant gets a tensor in the order asked for, ONNX's own by default.
        """
        wanted = need(value)
        if array(wanted) is not None:
            return self._constant_value(wanted, layout)
        found = self._stored[wanted]
        if layout is None or layout == found.layout:
            return found
        return Stored(self.transposed(found, layout), layout)

    def transposed(self, found: Stored, layout: Layout) -> Tensor:
        """The tensor of ``found`` with its axes in the order of ``layout``; a TRANSPOSE operator."""
        order = tuple(found.layout.index(axis) for axis in layout)
        source = found.tensor
        batch = None if source.batch_axis is None else order.index(source.batch_axis)
        shape = tuple(source.shape[i] for i in order)
        permutation = self.ints(f"{source.name}_permutation", order)
        name = f"{source.name}_transposed"
        return self.emit("TRANSPOSE", [source, permutation], shape, name=name, dtype=source.dtype, batch_axis=batch)

    def bind(self, value: ir.Value, tensor: Tensor, layout: Layout) -> None:
        """Record that ``tensor`` holds ``value``; the tensor takes the value's name if it was made for it.

        Raises ValueError if the shapes do not fit: a fault of a rule.
        """
        expected = tuple(self.dims(value)[axis] for axis in layout)
        if tensor.shape != expected:
            raise ValueError(f"{name_of(value)!r} should be stored as {expected}, the rule made {tensor.shape}")
        self._stored[value] = Stored(tensor, layout)

    def emit(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        shape: Sequence[int],
        *,
        name: str,
        options: Mapping[str, Option] | None = None,
        dtype: DType = "float32",
        batch_axis: int | None = 0,
    ) -> Tensor:
        """Add an operator with one output of the stored ``shape`` and return that tensor."""
        output = Tensor(self.fresh(name), tuple(int(s) for s in shape), dtype, batch_axis=batch_axis)
        self.operators.append(Operator(kind, list(inputs), [output], dict(options or {})))
        return output

    def emit_for(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        value: ir.Value,
        layout: Layout,
        *,
        options: Mapping[str, Option] | None = None,
    ) -> Tensor:
        """Add the operator that computes an ONNX ``value``, stored in ``layout``, under its own name; binds it."""
        dims = self.dims(value)
        batch = layout.index(0) if self.has_batch(value) else None
        dtype = DTYPES[ir.DataType.FLOAT if value.dtype is None else value.dtype]
        output = Tensor(name_of(value), tuple(dims[axis] for axis in layout), dtype, batch_axis=batch)
        self.operators.append(Operator(kind, list(inputs), [output], dict(options or {})))
        self.bind(value, output, layout)
        return output

    def constant(self, name: str, content: Array, *, source: Source | None = None) -> Tensor:
        """A constant tensor. With ``source`` it keeps the initializer's name; else the name is made unique."""
        unique = name if source is not None else self.fresh(name)
        kind: Any = str(content.dtype)
        return Tensor(unique, content.shape, kind, data=content, source=source)

    def ints(self, name: str, numbers: Sequence[int]) -> Tensor:
        """A constant int32 vector: axes, sizes, paddings."""
        return self.constant(name, np.asarray(numbers, np.int32))

    def fresh(self, wish: str) -> str:
        """A tensor name that nothing else has."""
        name = unique_name(wish, self._names)
        self._names.add(name)
        return name

    def refuse(self, node: ir.Node, reason: str) -> ConversionError:
        """The error for a node that TFLite cannot do; raise it."""
        return ConversionError(f"{describe(node)} cannot be written to TFLite: {reason}")

    def arranged(
        self,
        value: ir.Value,
        view: Sequence[int],
        permute: Sequence[int],
        *,
        shape: Sequence[int] | None = None,
        channel_axis: int = 0,
    ) -> Tensor:
        """The tensor of an initializer reshaped to ``view``, then transposed by ``permute``; one for each arrangement.

        ``shape`` may join axes of the result, or add axes of size 1. ``channel_axis`` of the initializer is that of
        output channels. The first arrangement keeps the initializer's name, others get one of their own.

        Raises ValueError if the value is computed.
        """
        known = self._constants.setdefault(value, {})
        key = (tuple(view), tuple(permute), tuple(shape or ()))
        if key not in known:
            known[key] = self._arrange(value, *key, channel_axis=channel_axis)
            known[key].name = self.fresh(known[key].name) if len(known) > 1 else known[key].name
        return known[key]

    def _arrange(self, value: ir.Value, view: Layout, permute: Layout, shape: Layout, *, channel_axis: int) -> Tensor:
        content = need_array(value)
        source = Source(
            name_of(value),
            content.shape,
            view=None if view == content.shape else view,
            permute=None if permute == plain(len(permute)) else permute,
            channel_axis=channel_axis,
        )
        stored = np.ascontiguousarray(content.reshape(view).transpose(permute))
        return self.constant(name_of(value), stored.reshape(shape or stored.shape), source=source)

    def _constant_value(self, value: ir.Value, layout: Layout | None) -> Stored:
        shape = need_array(value).shape
        order = layout or plain(len(shape))
        return Stored(self.arranged(value, shape, order), order)


def need_array(value: ir.Value | None) -> Array:
    """The numbers of a constant. Raises ValueError if the value is computed."""
    content = array(value)
    if content is None:
        raise ValueError(f"{name_of(value)!r} is computed by the graph, expected an initializer")
    return np.asarray(content)
