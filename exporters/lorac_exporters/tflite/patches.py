"""The patch table of a .tflite file: where the numbers of each tensor that adaptation changes lie in it.

A tensor can be patched if its stored numbers are the model's own, each one once and in bytes of its own. An int8
weight and its bias change together, because their scales depend on both, so each brings the other along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from lorac_exporters.tflite.network import Network, Operator, Quantization, Source, Tensor
from lorac_exporters.tflite.quantize_rules import WEIGHTED
from lorac_exporters.tflite.schema import Ranges, buffer_ranges
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import Patch, Quantized

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """An int8 layer. Its weight, and its bias if it has one, are initializers of the model."""

    weight: Tensor
    bias: Tensor | None
    input_scale: float

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def partner(self, tensor: Tensor) -> Tensor | None:
        return self.bias if tensor is self.weight else self.weight


def with_partners(network: Network, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """``wanted`` tensors (name -> ONNX shape) and what must change with them: the other one of an int8 layer.

    A float network gives ``wanted`` back.
    """
    found = dict(wanted)
    for layer in _int8_layers(network).values():
        pair = [tensor.source for tensor in layer.tensors() if tensor.source is not None]
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
    ranges, layers, stored = buffer_ranges(content, file_name), _int8_layers(network), _by_source(network)
    problems, patches = [], []
    for name, shape in wanted.items():
        tensors = stored.get(name, [])
        problem = _problem(name, tensors, shape, ranges, layers)
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
    name: str, tensors: list[Tensor], shape: Shape, ranges: Mapping[str, Ranges], layers: Mapping[int, _Layer]
) -> str:
    """Why a tensor cannot be patched; empty if it can be."""
    if not tensors:
        return f"{name} is stored with other numbers than the model has, or not at all"
    if len(tensors) > 1:
        return f"{name} is stored {len(tensors)} times ({', '.join(t.name for t in tensors)})"
    (tensor,) = tensors
    source, shared = tensor.source, ranges[tensor.name].shared_with
    if source is None or source.shape != tuple(shape):
        return f"{name} has shape {None if source is None else source.shape}, expected {tuple(shape)}"
    if shared:
        return f"{name} shares its bytes with {', '.join(shared)}"
    if tensor.quantization is not None and id(tensor) not in layers:
        return f"{name} is stored as {tensor.dtype}, but is not weight or bias of a layer; its scale would not follow"
    if tensor.quantization is not None and not _has_scales_in_order(tensor.quantization, source):
        return f"{name} is stored as {tensor.dtype} with its channels in another order; export it as float32 or fp16"
    return ""


def _has_scales_in_order(quantization: Quantization, source: Source) -> bool:
    """Whether there is one scale, or one for each channel of the initializer, in the initializer's order."""
    scales, axis = quantization.scale.size, source.channel_axis
    view = source.shape if source.view is None else source.view
    return scales == 1 or (scales == source.shape[axis] and axis < len(view) and view[axis] == scales)


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
    partner = layer.partner(tensor)
    if where.scales is None or tensor.source is None:
        raise ValueError(f"{tensor.name} has no scales")
    return Quantized(
        axis=tensor.source.channel_axis,
        scales=where.scales,
        partner=None if partner is None or partner.source is None else partner.source.name,
        input_scale=layer.input_scale,
    )


def _int8_layers(network: Network) -> dict[int, _Layer]:
    """By the identity of weight and bias: the quantized layers that hold them."""
    found: dict[int, _Layer] = {}
    for operator in network.operators:
        layer = _int8_layer(operator)
        if layer is not None:
            found |= {id(tensor): layer for tensor in layer.tensors()}
    return found


def _int8_layer(operator: Operator) -> _Layer | None:
    place = WEIGHTED.get(operator.kind)
    if place is None:
        return None
    activation, weight = operator.inputs[place.data], operator.inputs[place.weight]
    bias = operator.inputs[place.bias] if place.bias < len(operator.inputs) else None
    if activation is None or activation.quantization is None or weight is None or weight.quantization is None:
        return None
    if weight.source is None or (bias is not None and bias.source is None):
        return None
    return _Layer(weight, bias, float(activation.quantization.scale[0]))


def _by_source(network: Network) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for tensor in network.constants():
        if tensor.source is not None:
            found.setdefault(tensor.source.name, []).append(tensor)
    return found
