"""Append nodes to a graph, with the shape and element type of every value known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import name_of, set_array, value_names

Attribute = int | float | str | Sequence[int] | Sequence[float]
Attributes = dict[str, Attribute]
Dim = int | str | None
Dims = tuple[Dim, ...]


class Tape:
    """Writes nodes at the end of ``graph``; equal constants are stored once.

    >>> x = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    >>> tape = Tape(ir.Graph([x], [], nodes=[], opset_imports={"": 18}))
    >>> y = tape.op("Mul", x, 2.0, like=x)
    >>> y.name, dims(y)
    ('mul', ('batch', 8))
    """

    def __init__(self, graph: ir.Graph, prefix: str = "") -> None:
        self.graph = graph
        self._prefix = prefix
        self._taken = value_names(graph)
        self._counts: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | float | None,
        like: ir.Value | None = None,
        shape: Sequence[Dim] | None = None,
        dtype: ir.DataType | None = None,
        name: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> ir.Value:
        """Append a node with one output; a Python number among the inputs becomes a float32 scalar.

        The output has the shape ``shape``, or that of ``like``; its element type is ``dtype``, or that of ``like``,
        or float32. ``name`` is a wish for the name of node and output.
        """
        dims_ = shape if shape is not None else (None if like is None else dims(like))
        kind = dtype or (like.dtype if like is not None else None) or ir.DataType.FLOAT
        return self.multi_op(op_type, inputs, [dims_], dtype=kind, name=name, attributes=attributes)[0]

    def multi_op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | float | None],
        shapes: Sequence[Sequence[Dim] | None],
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        name: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Sequence[ir.Value]:
        """Append a node with one output for each entry of ``shapes``."""
        values = [v if v is None or isinstance(v, ir.Value) else self.constant(np.float32(v)) for v in inputs]
        node = ir.node(op_type, values, attributes, num_outputs=len(shapes))
        node.name = self.fresh(name or op_type.lower())
        for index, (output, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            output.name = node.name if index == 0 else self.fresh(f"{node.name}.{index}")
            output.type = ir.TensorType(dtype)
            output.shape = None if shape is None else ir.Shape(shape)
        self.graph.append(node)
        return node.outputs

    def constant(self, content: npt.ArrayLike, name: str = "") -> ir.Value:
        """An initializer holding ``content``, with its dtype; without ``name`` equal ones are shared."""
        numbers = np.asarray(content)
        if name:
            return self._register(self.fresh(name), numbers)
        key = (numbers.dtype.str, numbers.shape, numbers.tobytes())
        if key not in self._constants:
            self._constants[key] = self._register(self.fresh("constant"), numbers)
        return self._constants[key]

    def _register(self, name: str, numbers: npt.NDArray[np.generic]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(numbers.dtype)))
        set_array(value, numbers)
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, shape: Sequence[Dim], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A new input of the graph; an initializer of that name becomes one."""
        value = self.graph.initializers.pop(name, None) or ir.Value(name=name)
        value.const_value, value.type, value.shape = None, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.inputs.append(value)
        self._taken.add(name)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """A constant 1-D int64 tensor, as axes, shapes and pads are given."""
        return self.constant(np.array(numbers, np.int64))

    def fresh(self, wish: str) -> str:
        """A name that nothing has yet: the wish, or the wish with a number."""
        wish = self._prefix + wish
        count = self._counts.get(wish, 0)
        name = f"{wish}_{count}" if count else wish
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._counts[wish] = count + 1
        self._taken.add(name)
        return name


def dims(value: ir.Value) -> Dims:
    """The sizes of a value: a number, the name of a symbolic size ("batch"), or None.

    Raises ValueError if not even the rank is known.
    """
    if value.shape is None:
        raise ValueError(f"the shape of {name_of(value)!r} is not known")
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def sizes(value: ir.Value, start: int = 0) -> tuple[int, ...]:
    """The sizes of a value from axis ``start`` on, all of them numbers.

    Raises ValueError if one is symbolic.
    """
    found = dims(value)[start:]
    if not all(isinstance(d, int) for d in found):
        raise ValueError(f"{name_of(value)!r} has sizes {found}, expected numbers from axis {start} on")
    return tuple(d for d in found if isinstance(d, int))
