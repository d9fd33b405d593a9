"""A .tflite file as a network. Nothing in the file is trusted: each index, count and size is checked before its use.

Reading goes through the classes that the package `tflite` generates. They check nothing, but they are Python: a
wrong offset ends in an exception, which `from_bytes` words for the user.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tflite

from lorac_exporters.tflite import schema_zip
from lorac_exporters.tflite.network import Array, Network, Operator, Option, Quantization, Tensor
from lorac_exporters.tflite.schema_options import Field, camel, enum_name, options_table
from lorac_exporters.tflite.schema_write import IDENTIFIER, SCHEMA_VERSION, SIGNATURE
from lorac_runtime.errors import ArtifactError

_DTYPES = {"FLOAT32", "FLOAT16", "INT32", "INT64", "INT8", "UINT8", "BOOL"}
# Far above what networks have; a hostile file lets thousands of tables point to the same megabytes.
_MOST = 20_000  # tables of one kind
_MOST_ENDS = 1000  # inputs or outputs of an operator or of the graph
_MOST_AXES = 8
_MOST_LETTERS = 10_000  # of a name
_MOST_METADATA = 1 << 26  # bytes
# What reading at wrong places can raise: no struct there, no such index, no text, absurd sizes.
_DAMAGE = (struct.error, IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError, AttributeError)


def from_bytes(content: bytes | memoryview, where: str) -> Network:
    """The network in a .tflite file; ``where`` names the file in messages.

    Constants are read-only views of ``content``. ``options`` hold every field of the operator's table, idle ones
    too. The inverse of `to_bytes`.

    Raises ArtifactError if the file is damaged, no .tflite file, or holds what this package does not handle:
    several sub-graphs, custom operators, variables, sparse or sub-byte tensors, dynamic sizes other than the batch.
    """
    view = memoryview(content).toreadonly().cast("B")
    try:
        return _Reader(view).network()
    except ArtifactError as err:
        raise ArtifactError(f"{where} cannot be read: {err}") from err
    except _DAMAGE as err:
        raise ArtifactError(f"{where} is damaged or no .tflite file ({type(err).__name__}: {err})") from err


class _Reader:
    """The tables of one file."""

    def __init__(self, content: memoryview) -> None:
        if len(content) < 16 or bytes(content[4:8]) != IDENTIFIER:
            raise ArtifactError("it does not begin like a .tflite file")
        self.content = content
        self.model = tflite.Model.GetRootAs(content)
        self.sound(self.model)
        if self.model.Version() != SCHEMA_VERSION:
            raise ArtifactError(f"it has version {self.model.Version()} of the schema, expected {SCHEMA_VERSION}")
        graphs = list(self.tables(self.model, "Subgraphs"))
        if len(graphs) != 1:
            raise ArtifactError(f"it has {len(graphs)} sub-graphs, expected one")
        self.graph = graphs[0]
        self.buffers = list(self.tables(self.model, "Buffers"))
        self.tensors = [self.tensor(table) for table in self.tables(self.graph, "Tensors")]

    def network(self) -> Network:
        codes = [_code(table) for table in self.tables(self.model, "OperatorCodes")]
        inputs, outputs = self.chosen(self.graph, "Inputs"), self.chosen(self.graph, "Outputs")
        input_keys, output_keys = self.keys(inputs, outputs)
        network = Network(
            [self.operator(table, codes) for table in self.tables(self.graph, "Operators")],
            inputs,
            outputs,
            input_keys,
            output_keys,
            _text(self.model.Description()),
            self.metadata(),
            schema_zip.appended(self.content),
        )
        _check_order(network)
        return network

    def tensor(self, table: Any) -> Tensor:
        name = _text(table.Name())
        if table.IsVariable() or table.Sparsity() is not None or table.VariantTensorsLength():
            raise ArtifactError(f"tensor {name!r} is a variable, sparse or a variant")
        kind = enum_name("TensorType", table.Type())
        if kind not in _DTYPES:
            raise ArtifactError(f"tensor {name!r} is {kind}, expected one of {', '.join(sorted(_DTYPES))}")
        shape = _shape(name, _numbers(table, "Shape"))
        tensor = Tensor(name, shape, kind.lower(), batch_axis=_batch_axis(name, shape, table))  # type: ignore[arg-type]
        tensor.data = self.data(tensor, table.Buffer())
        quantization = table.Quantization()
        if quantization is not None:
            self.sound(quantization)
            tensor.quantization = _quantization(tensor, quantization)
        return tensor

    def data(self, tensor: Tensor, number: int) -> Array | None:
        """The constant's numbers; None for a tensor whose buffer is empty, unless it needs no numbers."""
        raw = self.bytes_of(number)
        dtype = np.dtype(tensor.dtype).newbyteorder("<")
        if not raw.size:
            return np.zeros(tensor.shape, dtype) if 0 in tensor.shape else None
        if raw.size != dtype.itemsize * math.prod(tensor.shape):
            raise ArtifactError(f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape} but has {raw.size} bytes")
        return raw.view(dtype).reshape(tensor.shape)

    def bytes_of(self, number: int) -> Array:
        buffer = self.buffers[number]
        if buffer.Offset() or buffer.Size():
            raise ArtifactError("it keeps numbers outside of its tables, as files above 2 GB do")
        return _numbers(buffer, "Data", np.uint8)

    def operator(self, table: Any, codes: Sequence[tuple[str, int]]) -> Operator:
        kind, version = codes[table.OpcodeIndex()]
        inputs = [None if i == -1 else self.tensors[_index(i)] for i in _ends(table, "Inputs")]
        options = self.options(kind, table)
        if table.CustomOptionsLength() or table.MutatingVariableInputsLength() or table.IntermediatesLength():
            raise ArtifactError(f"{kind} has custom options, variables or intermediate tensors")
        return Operator(kind, inputs, self.chosen(table, "Outputs"), options, version)

    def options(self, kind: str, table: Any) -> dict[str, Option]:
        expected = options_table(kind)
        if not expected.fields or not table.BuiltinOptionsType():
            return {field.name: field.idle for field in expected.fields}
        if table.BuiltinOptionsType() != expected.union_type:
            raise ArtifactError(f"an operator {kind} has the options of another")
        union, found = table.BuiltinOptions(), getattr(tflite, str(expected.name))()
        found.Init(union.Bytes, union.Pos)
        self.sound(found)
        return {field.name: _option(field, found) for field in expected.fields}

    def metadata(self) -> dict[str, bytes]:
        found = {_text(table.Name()): self.bytes_of(table.Buffer()) for table in self.tables(self.model, "Metadata")}
        if sum(content.size for content in found.values()) > _MOST_METADATA:
            raise ArtifactError("its metadata are larger than 64 MB")
        return {name: content.tobytes() for name, content in found.items()}

    def keys(self, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names in the signature ``serving_default``; the tensors' own in a file without it."""
        for table in self.tables(self.model, "SignatureDefs"):
            if _text(table.SignatureKey()) == SIGNATURE:
                return self.named(table, "Inputs", inputs), self.named(table, "Outputs", outputs)
        return tuple(t.name for t in inputs), tuple(t.name for t in outputs)

    def named(self, signature: Any, side: str, tensors: list[Tensor]) -> tuple[str, ...]:
        pairs = [(self.tensors[_index(m.TensorIndex())], _text(m.Name())) for m in self.tables(signature, side)]
        if len(pairs) != len(tensors) or {t for t, _ in pairs} != set(tensors):
            raise ArtifactError(f"the signature's {side.lower()} are not those of the graph")
        by_place = sorted(pairs, key=lambda pair: tensors.index(pair[0]))
        return tuple(name for _, name in by_place)

    def chosen(self, table: Any, field: str) -> list[Tensor]:
        """The tensors that a vector of indices names."""
        return [self.tensors[_index(i)] for i in _ends(table, field)]

    def tables(self, owner: Any, field: str) -> Iterator[Any]:
        """The tables of a vector, one after the other."""
        count = getattr(owner, f"{field}Length")()
        if count > _MOST:
            raise ArtifactError(f"it claims to have {count} {field.lower()}")
        item: Callable[[int], Any] = getattr(owner, field)
        for i in range(count):
            table = item(i)
            self.sound(table)
            yield table

    def sound(self, table: Any) -> None:
        """Raises ArtifactError if a table or the list of its fields does not lie inside of the file."""
        place, size = table._tab.Pos, len(self.content)
        if not 0 <= place <= size - 4:
            raise ArtifactError("a table lies outside of the file")
        fields = place - struct.unpack_from("<i", self.content, place)[0]
        if not 0 <= fields <= size - 4:
            raise ArtifactError("a table lies outside of the file")
        length = struct.unpack_from("<H", self.content, fields)[0]
        if length < 4 or length % 2 or fields + length > size:
            raise ArtifactError("a table's list of fields is damaged")


def _code(table: Any) -> tuple[str, int]:
    number = max(table.BuiltinCode(), table.DeprecatedBuiltinCode())
    kind = enum_name("BuiltinOperator", number)
    if kind == "CUSTOM":
        raise ArtifactError(f"it has the custom operator {_text(table.CustomCode())!r}")
    options_table(kind)
    return kind, table.Version()


def _shape(name: str, numbers: Array, *, lowest: int = 0) -> tuple[int, ...]:
    if numbers.size > _MOST_AXES or (numbers < lowest).any():
        raise ArtifactError(f"{name!r} has {numbers.size} axes, or one of negative size")
    return tuple(numbers.tolist())


def _ends(table: Any, field: str) -> list[int]:
    """Indices of tensors."""
    numbers = _numbers(table, field)
    if numbers.size > _MOST_ENDS:
        raise ArtifactError(f"it claims to have {numbers.size} {field.lower()} in one place")
    indices: list[int] = numbers.tolist()
    return indices


def _batch_axis(name: str, shape: tuple[int, ...], table: Any) -> int | None:
    signature = _numbers(table, "ShapeSignature").tolist()
    if not signature:
        return None
    free = [axis for axis, size in enumerate(signature) if size == -1]
    fits = len(signature) == len(shape) and all(s in (-1, d) for s, d in zip(signature, shape, strict=True))
    if not fits or len(free) > 1:
        raise ArtifactError(f"tensor {name!r} has shape {shape} and signature {signature}: only a batch may be free")
    return free[0] if free else None


def _quantization(tensor: Tensor, table: Any) -> Quantization | None:
    """None where the table says nothing, as some writers have it for float tensors."""
    scale, zero = _numbers(table, "Scale", np.float32), _numbers(table, "ZeroPoint", np.int64)
    if not scale.size:
        return None
    axis = table.QuantizedDimension()
    if table.DetailsType() or scale.size not in (1, *tensor.shape) or (zero.size and zero.size != scale.size):
        raise ArtifactError(f"tensor {tensor.name!r} is quantized in a way that is not known here")
    if scale.size > 1 and (axis not in range(len(tensor.shape)) or tensor.shape[axis] != scale.size):
        raise ArtifactError(f"tensor {tensor.name!r} has {scale.size} scales along axis {axis} of {tensor.shape}")
    return Quantization(scale, zero if zero.size else np.zeros(scale.shape, np.int64), axis)


def _option(field: Field, table: Any) -> Option:
    if field.kind == "ints":
        return _shape(field.name, _numbers(table, camel(field.name)), lowest=-_MOST_AXES)
    value: bool | int | float = getattr(table, camel(field.name))()
    return enum_name(field.kind, int(value)) if field.kind[0].isupper() else value


def _numbers(table: Any, field: str, dtype: type[np.generic] = np.int32) -> Array:
    """A vector of numbers as a view; empty where the field is absent."""
    if getattr(table, f"{field}IsNone")():
        return np.zeros(0, dtype)
    found: Array = getattr(table, f"{field}AsNumpy")()
    return found


def _index(number: int) -> int:
    """A tensor's index; negative ones would count from the end."""
    if number < 0:
        raise IndexError(f"no tensor {number}")
    return number


def _text(raw: bytes | None) -> str:
    if raw is not None and len(raw) > _MOST_LETTERS:
        raise ArtifactError(f"it has a name of {len(raw)} letters")
    return "" if raw is None else raw.decode()


def _check_order(network: Network) -> None:
    """Operators read only what is there before them, and nothing is made twice."""
    known = {*network.inputs, *network.constants()}
    for operator in network.operators:
        made = set(operator.outputs)
        if not known.issuperset(t for t in operator.inputs if t is not None) or known & made:
            raise ArtifactError(f"an operator {operator.kind} reads what is not there yet, or makes a tensor twice")
        known |= made
    if not known.issuperset(network.outputs):
        raise ArtifactError("an output is made by no operator")
