"""The patch table of a .tflite file: where the numbers of each tensor that adaptation changes lie in it.

A tensor can be patched if its stored numbers are the model's own, each one once and in bytes of its own. An int8
weight and its bias change together, because their scales depend on both, so each brings the other along.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.quantize_rules import WEIGHTED
from lorac_exporters.tflite.schema import Ranges, buffer_ranges
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import ByteRange, Patch, Quantized

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """An int8 layer whose weight and bias are both initializers of the model."""

    weight: Tensor
    bias: Tensor
    input_scale: float

    def partner(self, tensor: Tensor) -> Tensor:
        return self.bias if tensor is self.weight else self.weight


def with_partners(network: Network, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """``wanted`` tensors (name -> ONNX shape) and what must change with them: the other one of an int8 layer.

    A float network gives ``wanted`` back.
    """
    found = dict(wanted)
    for layer in _int8_layers(network).values():
        pair = [t.source for t in (layer.weight, layer.bias) if t.source is not None]
        if any(source.name in wanted for source in pair):
            found |= {source.name: source.shape for source in pair}
    return found


def patch_entries(
    network: Network, content: bytes | memoryview, file_name: str, wanted: Mapping[str, Shape]
) -> tuple[Patch, ...]:
    """The patch table of the ``wanted`` tensors (name -> ONNX shape) in ``content``, the bytes of ``network``.

    ``file_name`` is what the file is called in the artifact. For an int8 network pass `with_partners`.

    Raises ConversionError naming every tensor that cannot be patched: its numbers were changed or left out when the
    file was made, it is stored more than once, it shares bytes with another, or is an int8 number without a layer.
    """
    ranges = buffer_ranges(content)
    shared, layers = _shared(network, ranges), _int8_layers(network)
    stored = _by_source(network)
    problems, patches = [], []
    for name, shape in wanted.items():
        tensors = stored.get(name, [])
        problem = _problem(name, tensors, shape, shared, layers)
        if problem:
            problems.append(problem)
        else:
            patches.append(_patch(tensors[0], file_name, ranges, layers.get(id(tensors[0]))))
    if problems:
        raise ConversionError(listed(f"{file_name} holds tensors that cannot be adapted in place:", problems))
    return tuple(patches)


def unpatchable(network: Network, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the initializers ``names`` whose own numbers are not in the network: rules changed or absorbed them."""
    stored = _by_source(network)
    return tuple(name for name in names if name not in stored)


def _problem(
    name: str, tensors: list[Tensor], shape: Shape, shared: Mapping[int, str], layers: Mapping[int, _Layer]
) -> str:
    """Why a tensor cannot be patched; empty if it can be."""
    if not tensors:
        return f"{name} is stored with other numbers than the model has, or not at all"
    if len(tensors) > 1:
        return f"{name} is stored {len(tensors)} times ({', '.join(t.name for t in tensors)})"
    (tensor,) = tensors
    source = tensor.source
    if source is None or source.shape != tuple(shape):
        return f"{name} has shape {None if source is None else source.shape}, expected {tuple(shape)}"
    if id(tensor) in shared:
        return f"{name} shares its bytes with {shared[id(tensor)]}"
    if tensor.quantization is not None and id(tensor) not in layers:
        return f"{name} is stored as {tensor.dtype}, but is not weight or bias of a layer; its scale would not follow"
    return ""


def _patch(tensor: Tensor, file_name: str, ranges: Mapping[str, Ranges], layer: _Layer | None) -> Patch:
    source, where = tensor.source, ranges[tensor.name].data
    if source is None:
        raise ValueError(f"{tensor.name} has no source")
    quantized = None if layer is None else _quantized(tensor, layer, ranges[tensor.name])
    return Patch(
        tensor=source.name,
        file=file_name,
        offset=where.offset,
        nbytes=where.nbytes,
        dtype=tensor.dtype,
        shape=source.shape,
        permute=source.permute,
        view=source.view,
        quantization=quantized,
    )


def _quantized(tensor: Tensor, layer: _Layer, where: Ranges) -> Quantized:
    partner = layer.partner(tensor).source
    if where.scales is None or tensor.source is None or partner is None:
        raise ValueError(f"{tensor.name} has no scales")
    return Quantized(
        axis=tensor.source.channel_axis,
        scales=where.scales,
        partner=partner.name,
        input_scale=layer.input_scale,
    )


def _int8_layers(network: Network) -> dict[int, _Layer]:
    """By the identity of weight and bias: the quantized layers that hold them."""
    found: dict[int, _Layer] = {}
    for operator in network.operators:
        layer = _int8_layer(operator)
        if layer is not None:
            found |= {id(layer.weight): layer, id(layer.bias): layer}
    return found


def _int8_layer(operator: Operator) -> _Layer | None:
    place = WEIGHTED.get(operator.kind)
    if place is None or len(operator.inputs) <= place.bias:
        return None
    activation, weight, bias = (operator.inputs[i] for i in (place.data, place.weight, place.bias))
    if activation is None or weight is None or bias is None or weight.source is None or bias.source is None:
        return None
    if activation.quantization is None or weight.quantization is None or bias.quantization is None:
        return None
    return _Layer(weight, bias, float(activation.quantization.scale[0]))


def _by_source(network: Network) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for tensor in network.constants():
        if tensor.source is not None:
            found.setdefault(tensor.source.name, []).append(tensor)
    return found


def _shared(network: Network, ranges: Mapping[str, Ranges]) -> dict[int, str]:
    """By the identity of a constant: the name of another one that lies in the same bytes."""
    found: dict[int, str] = {}
    for one, other in _overlapping(network.constants(), ranges):
        found[id(one)], found[id(other)] = other.name, one.name
    return found


def _overlapping(constants: list[Tensor], ranges: Mapping[str, Ranges]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each constant that begins before one further ahead in the file has ended, with that one."""
    where = [(ranges[t.name].data, t) for t in constants if math.prod(t.shape)]
    where.sort(key=lambda pair: pair[0].offset)
    end, last = 0, None
    for data, tensor in where:
        if last is not None and data.offset < end:
            yield last, tensor
        if data.offset + data.nbytes > end:
            end, last = data.offset + data.nbytes, tensor
