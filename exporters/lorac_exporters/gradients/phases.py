"""The input gradient of a strided convolution: an ordinary convolution for each phase of the stride.

With stride s, input position s * j + r (phase r) meets output positions j + m through tap r + pad - s * m. So each
phase of the input's gradient is a convolution of the output's gradient with some of the taps, and no work is done on
zeros. The phases stay apart (`Phased`) until all gradients of the input are summed, and are interleaved then, once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.geometry import Geometry, Sizes
from lorac_exporters.gradients.rule import Phased
from lorac_exporters.gradients.tape import Tape, dims, sizes


def can_split(g: Geometry) -> bool:
    """Whether the decomposition is written here: any stride and groups, no dilation."""
    return max(g.dilations) == 1


def input_gradient_by_phases(tape: Tape, g: Geometry, grad: ir.Value, turned: ir.Value, *, like: ir.Value) -> Phased:
    """(batch, c_out, ...) -> the phases of (batch, c_in, ...); ``turned`` is (c_in, c_out/groups, *kernel)."""
    phases = {}
    for phase in itertools.product(*(range(stride) for stride in g.strides)):
        taps = [_taps(g, axis, r) for axis, r in enumerate(phase)]
        if all(taps):
            phases[phase] = _phase(tape, g, grad, turned, taps, phase, like)
    return Phased(g.strides, phases, like)


def _taps(g: Geometry, axis: int, phase: int) -> list[int]:
    """Taps that meet a phase, in the order of the output positions that they meet: the last tap first."""
    high = phase + g.begins[axis]
    return [tap for tap in range(g.kernel[axis] - 1, -1, -1) if (high - tap) % g.strides[axis] == 0]


def _phase(
    tape: Tape, g: Geometry, grad: ir.Value, turned: ir.Value, taps: list[list[int]], phase: Sizes, like: ir.Value
) -> ir.Value:
    size = [math.ceil(n / s) for n, s in zip(g.in_size, g.strides, strict=True)]
    axes = zip(phase, g.begins, taps, g.strides, strict=True)
    offsets = [(r + begin - found[0]) // stride for r, begin, found, stride in axes]
    begins = [-offset for offset in offsets]
    counts = [len(found) for found in taps]
    axes_ = zip(size, g.out_size, counts, offsets, strict=True)
    ends = [j - n + count - 1 + offset for j, n, count, offset in axes_]
    grad, pads = _within(tape, grad, begins, ends)
    kernel = _picked(tape, g, turned, taps)
    shape = (dims(like)[0], g.c_in, *size)
    return tape.op("Conv", grad, kernel, shape=shape, attributes={"pads": pads, "group": g.groups}, name="grad_phase")


def _within(tape: Tape, grad: ir.Value, begins: list[int], ends: list[int]) -> tuple[ir.Value, list[int]]:
    """Pads that are not negative, and the gradient cropped where they were."""
    starts = [max(0, -b) for b in begins]
    stops = [size + min(0, end) for size, end in zip(sizes(grad, 2), ends, strict=True)]
    if any(starts) or any(end < 0 for end in ends):
        shape = (*dims(grad)[:2], *(stop - start for start, stop in zip(starts, stops, strict=True)))
        axes = tape.ints(*range(2, len(shape)))
        grad = tape.op("Slice", grad, tape.ints(*starts), tape.ints(*stops), axes, shape=shape)
    return grad, [max(0, p) for p in (*begins, *ends)]


def _picked(tape: Tape, g: Geometry, turned: ir.Value, taps: list[list[int]]) -> ir.Value:
    value, size = turned, [*sizes(turned)]
    for axis, found in enumerate(taps):
        if found != list(range(g.kernel[axis])):
            size[axis + 2] = len(found)
            attributes = {"axis": axis + 2}
            value = tape.op("Gather", value, tape.ints(*found), shape=size, attributes=attributes, name="phase_kernel")
    return value


def add_phases(tape: Tape, one: Phased, other: Phased) -> Phased:
    """The sum of two gradients with the same strides, phase by phase."""
    both = {
        phase: tape.op("Add", one.phases[phase], other.phases[phase], like=one.phases[phase], name="grad_sum")
        for phase in one.phases.keys() & other.phases.keys()
    }
    return Phased(one.strides, {**one.phases, **other.phases, **both}, one.like)


def interleave(tape: Tape, phased: Phased) -> ir.Value:
    """The gradient as one tensor: phase (r, q) goes to positions (s * i + r, s * j + q)."""
    known = next(iter(phased.phases.values()))
    zeros = _zeros(tape, known) if len(phased.phases) < math.prod(phased.strides) else known
    joined = {p: phased.phases.get(p, zeros) for p in itertools.product(*map(range, phased.strides))}
    for axis in reversed(range(len(phased.strides))):
        leads = dict.fromkeys(phase[:axis] for phase in joined)
        joined = {lead: _woven(tape, [v for p, v in joined.items() if p[:axis] == lead], axis + 2) for lead in leads}
    return _trimmed(tape, joined[()], phased.like)


def _zeros(tape: Tape, like: ir.Value) -> ir.Value:
    shape = tape.op("Shape", like, shape=(len(dims(like)),), dtype=ir.DataType.INT64)
    return tape.op("Expand", 0.0, shape, like=like, name="zeros")


def _woven(tape: Tape, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    """The parts' entries in turn along ``axis``."""
    if len(parts) == 1:
        return parts[0]
    shape = dims(parts[0])
    apart = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    lifted = [tape.op("Unsqueeze", part, tape.ints(axis + 1), shape=apart) for part in parts]
    stacked = (*shape[: axis + 1], len(parts), *shape[axis + 1 :])
    together = tape.op("Concat", *lifted, shape=stacked, attributes={"axis": axis + 1})
    size = sizes(parts[0], 1)
    whole = (*size[: axis - 1], size[axis - 1] * len(parts), *size[axis:])
    return tape.op("Reshape", together, tape.ints(0, *whole), shape=(shape[0], *whole), name="interleaved")


def _trimmed(tape: Tape, value: ir.Value, like: ir.Value) -> ir.Value:
    """Without the positions beyond the end, which the last phases have where the stride leaves a rest."""
    if dims(value) == dims(like):
        return value
    stops = sizes(like, 2)
    axes = tape.ints(*range(2, 2 + len(stops)))
    return tape.op("Slice", value, tape.ints(*np.zeros_like(stops)), tape.ints(*stops), axes, like=like)
