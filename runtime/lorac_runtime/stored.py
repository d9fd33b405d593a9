"""From a tensor's float32 value to its bytes in a base file: order of axes, half precision, int8.

Pieces come with the offset where they belong, a block of output channels at a time where the file stores output
channels one after the other; else (depthwise weights) a tensor at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime import quantization as q8
from lorac_runtime.channels import BLOCK, Channels
from lorac_runtime.errors import AdapterError
from lorac_runtime.places import ByteRange, Patch, Quantized

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Piece = tuple[int, memoryview]  # offset in the file, bytes

_INFINITY = 0x7C00  # the bits of a float16


@dataclasses.dataclass
class Losses:
    """Numbers that the file's form could not hold, counted while pieces are made.

    ``overflowed`` counts values beyond float16, stored as the largest one; ``saturated`` names the biases that did
    not fit into int32.
    """

    overflowed: int = 0
    saturated: list[str] = dataclasses.field(default_factory=list)


def ranges(patch: Patch) -> tuple[ByteRange, ...]:
    """Every stretch of the file that a patch entry owns: numbers, and scales where it has some."""
    return (patch.content,) if patch.quantization is None else (patch.content, patch.quantization.scales)


def pieces(patches: Sequence[Patch], values: Mapping[str, Channels], losses: Losses) -> Iterator[Piece]:
    """What to write where, so that ``patches`` hold their ``values``; together all of their `ranges`, each byte once.

    ``values`` must hold both partners of a quantized layer. ``losses`` is filled along the way.

    Raises AdapterError for values that have no int8 form.
    """
    by_name = {p.tensor: p for p in patches}
    for patch in patches:
        if patch.quantization is None:
            yield from _float_pieces(patch, values[patch.tensor], losses)
        elif patch.dtype == "int8":
            partner = patch.quantization.partner
            bias = None if partner is None else by_name[partner]
            yield from _layer_pieces(patch, patch.quantization, bias, values, losses)


def as_half(value: Array) -> tuple[npt.NDArray[np.float16], int]:
    """The nearest float16 numbers, ties to even, and how many were too large: those become the largest one.

    >>> numbers, overflowed = as_half(np.float32([0.5, -2049, 1e6]))
    >>> numbers.tolist(), overflowed
    ([0.5, -2048.0, 65504.0], 1)
    """
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    bits = half.view(np.uint16)
    infinite = (bits & 0x7FFF) == _INFINITY
    overflowed = int(np.count_nonzero(infinite))
    if overflowed:
        bits[infinite] -= 1  # the largest number of the same sign
    return half, overflowed


def _float_pieces(patch: Patch, value: Channels, losses: Losses) -> Iterator[Piece]:
    at, half = patch.offset, patch.dtype == "float16"
    for block in _stored_blocks(patch, _halves(value, losses) if half else value.blocks()):
        data = _bytes(block, "<f2" if half else "<f4")
        yield at, data
        at += len(data)


def _halves(value: Channels, losses: Losses) -> Iterator[Array]:
    for block in value.blocks():
        numbers, overflowed = as_half(block)
        losses.overflowed += overflowed
        yield numbers


def _layer_pieces(
    weight: Patch, quantized: Quantized, bias: Patch | None, values: Mapping[str, Channels], losses: Losses
) -> Iterator[Piece]:
    """An int8 weight with its scales, and the int32 bias whose scales follow from them."""
    offsets = None if bias is None else values[bias.tensor].whole().reshape(-1)
    found: list[Floats] = []
    at = weight.offset
    try:
        for block in _stored_blocks(weight, _int8_blocks(weight, quantized, values[weight.tensor], offsets, found)):
            data = _bytes(block, "i1")
            yield at, data
            at += len(data)
    except ValueError as err:
        raise AdapterError(f"{weight.tensor} cannot be stored in {weight.file}: {err}") from err
    scales = np.concatenate(found)
    yield quantized.scales.offset, _bytes(scales, "<f4")
    if bias is not None and bias.quantization is not None and offsets is not None:
        steps = q8.bias_scales(scales, quantized.input_scale)
        yield bias.quantization.scales.offset, _bytes(steps, "<f4")
        numbers, saturated = q8.quantized_bias(offsets, steps)
        losses.saturated += [bias.tensor] if saturated else []
        yield bias.offset, _bytes(numbers, "<i4")


def _int8_blocks(
    patch: Patch, quantized: Quantized, value: Channels, bias: Array | None, found: list[Floats]
) -> Iterator[Array]:
    """The int8 numbers in the tensor's own shape, blocks along its first axis; ``found`` collects the scales."""
    channels, scale = patch.shape[quantized.axis], quantized.input_scale
    if quantized.scales.nbytes != 4 * channels:
        found.append(_scale_of_all(value, bias, scale))
        yield from (q8.quantized_weight(block, found[0], None) for block in value.blocks())
        return
    done = 0
    for block in value.blocks() if quantized.axis == 0 else [value.whole()]:
        count = block.shape[quantized.axis]
        part = None if bias is None else bias[done : done + count]
        found.append(q8.weight_scales(block, quantized.axis, part, scale))
        yield q8.quantized_weight(block, found[-1], quantized.axis)
        done += count


def _scale_of_all(value: Channels, bias: Array | None, input_scale: float) -> Floats:
    """One scale for the whole weight, (1,)."""
    largest = np.max([q8.peaks(block, None) for block in value.blocks()], axis=0)
    return q8.scales_of(largest, None if bias is None else q8.peaks(bias, None), input_scale)


def _stored_blocks(patch: Patch, blocks: Iterator[Array]) -> Iterator[Array]:
    """Blocks along the tensor's first axis, in the order of the file: its own first axis in pieces."""
    view = patch.shape if patch.view is None else patch.view
    order = patch.permute or tuple(range(len(view)))
    if view[:1] == patch.shape[:1] and order[:1] in ((0,), ()):
        for block in blocks:
            yield block.reshape((len(block), *view[1:])).transpose(order or (0,))
        return
    stored = _together(blocks, patch.shape).reshape(view).transpose(order)
    length = max(1, BLOCK // max(1, stored[0].size))
    yield from (stored[i : i + length] for i in range(0, len(stored), length))


def _together(blocks: Iterator[Array], shape: tuple[int, ...]) -> Array:
    """The tensor of ``shape`` that the blocks make."""
    first = next(blocks)
    whole, at = np.empty(shape, first.dtype), 0
    for block in itertools.chain([first], blocks):
        whole[at : at + len(block)] = block
        at += len(block)
    return whole


def _bytes(value: Array, dtype: str) -> memoryview:
    return np.ascontiguousarray(value, dtype).data.cast("B")
