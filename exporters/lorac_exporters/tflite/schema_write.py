"""A network as the bytes of a .tflite file, with the builder functions that the package `tflite` generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
import tflite
from flatbuffers.builder import BuilderSizeError

from lorac_exporters.tflite import versions
from lorac_exporters.tflite.network import Array, Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.schema_options import camel, enum_value, options_table
from lorac_exporters.tflite.schema_zip import archive
from lorac_runtime.errors import ConversionError

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
SIGNATURE = "serving_default"
ALIGNMENT = 16  # bytes; the schema asks for it, XNNPACK and delegates rely on it
_PLACEHOLDER = 127  # in the 8-bit field of operator codes: look at the 32-bit field


def to_bytes(network: Network) -> bytes:
    """The .tflite file of a network, the same bytes each time; numbers start at multiples of 16 bytes.

    Operators of version 0 get the lowest version that describes them. No two tensors share a buffer.

    Raises ValueError for a network that is not sound: unknown operators or options, an operator that reads what
    nothing has made yet, numbers that do not have the tensor's shape and dtype. Raises ConversionError above 2 GB.
    """
    pieces = to_pieces(network)
    return b"".join(pieces) if len(pieces) > 1 else bytes(pieces[0])


def to_pieces(network: Network) -> list[memoryview | bytes]:
    """The same in one or two pieces, one after the other, which saves copying the first once more."""
    _check(network)
    tensors = network.tensors()
    numbers = [_little_endian(t.data) for t in tensors if t.data is not None and t.data.size]
    size = sum(n.nbytes + 64 for n in numbers) + sum(map(len, network.metadata.values()))
    try:
        writer = _Writer(size + 512 * (len(tensors) + len(network.operators)) + 4096)
        writer.model(network, tensors, numbers)
    except BuilderSizeError as err:
        raise ConversionError("the network is larger than 2 GB, more than a .tflite file can hold") from err
    content = writer.content()
    return [content, archive(network.files, len(content))] if network.files else [content]


class _Writer:
    """Writes tables bottom up, as flatbuffers want it: what a table points to comes before it."""

    def __init__(self, size: int) -> None:
        self.builder = flatbuffers.Builder(size)

    def content(self) -> memoryview:
        """The finished file, not copied."""
        return memoryview(self.builder.Bytes)[self.builder.Head() :]

    def model(self, network: Network, tensors: Sequence[Tensor], numbers: Sequence[Array]) -> None:
        """Buffers in the order: the empty one, constants, metadata."""
        codes = list(dict.fromkeys(_code(operator) for operator in network.operators))
        pieces: list[Array] = [*numbers, *(np.frombuffer(c, np.uint8) for c in network.metadata.values())]
        buffers = [self.table("Buffer"), *(self.buffer(piece) for piece in pieces)]
        metadata = [
            self.table("Metadata", name=self.string(name), buffer=1 + len(numbers) + i)
            for i, name in enumerate(network.metadata)
        ]
        root = self.table(
            "Model",
            version=SCHEMA_VERSION,
            operator_codes=self.tables([self.operator_code(*code) for code in codes]),
            subgraphs=self.tables([self.subgraph(network, tensors, codes)]),
            description=self.string(network.description),
            buffers=self.tables(buffers),
            metadata=self.tables(metadata),
            signature_defs=self.tables([self.signature(network, {t: i for i, t in enumerate(tensors)})]),
        )
        self.builder.Finish(root, file_identifier=IDENTIFIER)

    def subgraph(self, network: Network, tensors: Sequence[Tensor], codes: list[tuple[str, int]]) -> int:
        place = {tensor: i for i, tensor in enumerate(tensors)}
        buffers = _buffer_numbers(tensors)
        return self.table(
            "SubGraph",
            tensors=self.tables([self.tensor(tensor, buffers[tensor]) for tensor in tensors]),
            inputs=self.ints(place[tensor] for tensor in network.inputs),
            outputs=self.ints(place[tensor] for tensor in network.outputs),
            operators=self.tables([self.operator(op, codes.index(_code(op)), place) for op in network.operators]),
            name=self.string("main"),
        )

    def tensor(self, tensor: Tensor, buffer: int) -> int:
        free = tensor.batch_axis is not None
        return self.table(
            "Tensor",
            shape=self.ints(tensor.shape),
            type=enum_value("TensorType", tensor.dtype.upper()),
            buffer=buffer,
            name=self.string(tensor.name),
            quantization=self.quantization(tensor.quantization) if tensor.quantization else None,
            shape_signature=self.ints(tensor.signature) if free else None,
        )

    def quantization(self, quantization: Quantization) -> int:
        return self.table(
            "QuantizationParameters",
            scale=self.builder.CreateNumpyVector(np.asarray(quantization.scale, "<f4")),
            zero_point=self.builder.CreateNumpyVector(np.asarray(quantization.zero_point, "<i8")),
            quantized_dimension=quantization.axis,
        )

    def operator(self, operator: Operator, code: int, place: Mapping[Tensor, int]) -> int:
        options = options_table(operator.kind)
        return self.table(
            "Operator",
            opcode_index=code,
            inputs=self.ints(-1 if tensor is None else place[tensor] for tensor in operator.inputs),
            outputs=self.ints(place[tensor] for tensor in operator.outputs),
            builtin_options_type=options.union_type,
            builtin_options=self.options(operator) if options.name else None,
        )

    def options(self, operator: Operator) -> int:
        table = options_table(operator.kind)
        fields = {
            field.name: self.ints(value) if field.kind == "ints" else value
            for field, value in table.stored(operator.options).items()
        }
        return self.table(str(table.name), **fields)

    def operator_code(self, kind: str, version: int) -> int:
        number = enum_value("BuiltinOperator", kind)
        return self.table(
            "OperatorCode",
            deprecated_builtin_code=min(number, _PLACEHOLDER),
            version=version,
            builtin_code=number,
        )

    def signature(self, network: Network, place: Mapping[Tensor, int]) -> int:
        sides = ((network.input_keys, network.inputs), (network.output_keys, network.outputs))
        inputs, outputs = (
            self.tables(
                [
                    self.table("TensorMap", name=self.string(key), tensor_index=place[tensor])
                    for key, tensor in zip(keys, tensors, strict=True)
                ]
            )
            for keys, tensors in sides
        )
        return self.table("SignatureDef", inputs=inputs, outputs=outputs, signature_key=self.string(SIGNATURE))

    def buffer(self, numbers: Array) -> int:
        """Aligned by hand: the generated code does not know the schema's force_align."""
        self.builder.StartVector(1, numbers.nbytes, ALIGNMENT)
        head = self.builder.Head() - numbers.nbytes
        self.builder.head = head
        memoryview(self.builder.Bytes)[head : head + numbers.nbytes] = numbers.reshape(-1).view(np.uint8).data
        return self.table("Buffer", data=self.builder.EndVector())

    def table(self, name: str, /, **fields: Any) -> int:
        """One table of the schema; fields that are None are left out."""
        getattr(tflite, f"{name}Start")(self.builder)
        for field, value in fields.items():
            if value is not None:
                getattr(tflite, f"{name}Add{camel(field)}")(self.builder, value)
        offset: int = getattr(tflite, f"{name}End")(self.builder)
        return offset

    def tables(self, offsets: Sequence[int]) -> int:
        """A vector of tables."""
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())

    def ints(self, numbers: Iterable[int]) -> int:
        """A vector of int32."""
        return int(self.builder.CreateNumpyVector(np.asarray(list(numbers), "<i4")))

    def string(self, text: str) -> int:
        return int(self.builder.CreateString(text))


def _code(operator: Operator) -> tuple[str, int]:
    return operator.kind, operator.version or versions.lowest(operator)


def _little_endian(data: Array) -> Array:
    return np.ascontiguousarray(data, data.dtype.newbyteorder("<"))


def _buffer_numbers(tensors: Sequence[Tensor]) -> dict[Tensor, int]:
    """0, the empty buffer, for all but constants; those have one each, counted from 1."""
    numbers: dict[Tensor, int] = {}
    for tensor in tensors:
        filled = tensor.data is not None and tensor.data.size > 0
        numbers[tensor] = 1 + sum(n > 0 for n in numbers.values()) if filled else 0
    return numbers


def _check(network: Network) -> None:
    """Raises ValueError for the first thing that makes the network unsound."""
    for tensor in network.tensors():
        _check_tensor(tensor)
    known = {*network.inputs, *network.constants()}
    for operator in network.operators:
        options_table(operator.kind).stored(operator.options)
        late = [tensor.name for tensor in operator.inputs if tensor is not None and tensor not in known]
        if late:
            raise ValueError(f"{operator.kind} reads {', '.join(late)} before any operator has made it")
        known |= set(operator.outputs)
    missing = [tensor.name for tensor in network.outputs if tensor not in known]
    if missing:
        raise ValueError(f"no operator makes the output {', '.join(missing)}")
    names = [tensor.name for tensor in network.tensors()]
    if len(set(names)) < len(names):
        double = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several tensors are called {', '.join(double)}")


def _check_tensor(tensor: Tensor) -> None:
    data = tensor.data
    if data is not None and (data.shape != tensor.shape or data.dtype.name != tensor.dtype):
        raise ValueError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, its numbers are {data.dtype} {data.shape}")
    if tensor.batch_axis is not None and tensor.batch_axis not in range(len(tensor.shape)):
        raise ValueError(f"{tensor.name} has shape {tensor.shape}, its batch axis cannot be {tensor.batch_axis}")
    q = tensor.quantization
    if q is not None and (q.scale.ndim != 1 or q.scale.shape != q.zero_point.shape):
        raise ValueError(f"{tensor.name} has scales {q.scale.shape} and zero points {q.zero_point.shape}")
