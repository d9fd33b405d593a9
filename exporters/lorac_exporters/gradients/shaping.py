"""Gradient rules: Operators that move values without changing them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.gradients.moves import (
    Grads,
    Pads,
    axis_size,
    constant_input,
    contract,
    needed_ints,
    one_hot,
    only,
    pad,
    refuse,
    reshape,
    zeros_like,
)
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Attributes, Dim, Dims, Tape, dims
from lorac_exporters.graph_tools import int_attribute, ints_attribute, need, text_attribute

_FAR = 2**31 - 1  # exporters write this, or a larger end, for "up to the end"


# Other views of the same values


def reshaped(tape: Tape, site: Site) -> Grads:
    """Reshape, Flatten, Squeeze and Unsqueeze: back to the input's shape."""
    return only(site, reshape(tape, site.grad, dims(site.x)))


def transpose(tape: Tape, site: Site) -> Grads:
    """The inverse permutation."""
    order = ints_attribute(site.node, "perm", range(len(dims(site.x)))[::-1])
    back = [int(axis) for axis in np.argsort(order)]
    return only(site, tape.op("Transpose", site.grad, like=site.x, attributes={"perm": back}))


# Parts


def concat(tape: Tape, site: Site) -> Grads:
    """Each input's part of the gradient."""
    axis = int_attribute(site.node, "axis", 0) % len(dims(site.y))
    values = [need(value) for value in site.node.inputs]
    parts = [axis_size(site, value, axis) for value in values]
    if sum(site.needs) > 1:
        return _split(tape, site, axis, parts)
    bounds = np.cumsum([0, *parts])
    index = site.needs.index(True)
    where = [tape.ints(int(bounds[index])), tape.ints(int(bounds[index + 1])), tape.ints(axis)]
    found: list[ir.Value | None] = [None] * len(values)
    found[index] = tape.op("Slice", site.grad, *where, like=values[index])
    return found


def _split(tape: Tape, site: Site, axis: int, parts: list[int]) -> Grads:
    shapes = [dims(need(value)) for value in site.node.inputs]
    grads = tape.multi_op("Split", [site.grad, tape.ints(*parts)], shapes, attributes={"axis": axis})
    return [grad if needed else None for grad, needed in zip(grads, site.needs, strict=True)]


def split(tape: Tape, site: Site) -> Grads:
    """The gradients of the parts side by side; zeros for parts that the loss does not depend on."""
    axis = int_attribute(site.node, "axis", 0) % len(dims(site.x))
    pairs = zip(site.grads, site.node.outputs, strict=True)
    parts = [zeros_like(tape, output) if grad is None else grad for grad, output in pairs]
    return only(site, tape.op("Concat", *parts, like=site.x, attributes={"axis": axis}))


def slice_(tape: Tape, site: Site) -> Grads:
    """Zeros around the gradient, and between its elements where steps are larger than one."""
    grad, widths, steps = site.grad, Pads(), dict[int, int]()
    for axis, cells in _slices(site).items():
        size, step = axis_size(site, site.x, axis), abs(cells.step)
        steps[axis] = step
        widths[axis] = (min(cells), size - min(cells) - len(cells) * step)
    backwards = [axis for axis, cells in _slices(site).items() if cells.step < 0]
    if backwards:
        grad = _reversed(tape, grad, backwards)
    return only(site, pad(tape, _spread(tape, grad, steps), widths))


def _slices(site: Site) -> dict[int, range]:
    """The positions that a Slice takes along each axis; axes that it takes whole are left out."""
    starts, ends = needed_ints(site, 1, "starts"), needed_ints(site, 2, "ends")
    rank, given = len(dims(site.x)), constant_input(site, 3, "axes")
    axes = range(len(starts)) if given is None else [int(axis) % rank for axis in given]
    steps = [1] * len(starts) if constant_input(site, 4, "steps") is None else needed_ints(site, 4, "steps")
    found = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if (start, step) == (0, 1) and end >= _FAR:
            continue
        size = axis_size(site, site.x, axis)
        found[axis] = range(*slice(start, end, step).indices(size))
    return found


def _reversed(tape: Tape, value: ir.Value, axes: list[int]) -> ir.Value:
    ones = [-1] * len(axes)
    ends = tape.ints(*[np.iinfo(np.int64).min + 1] * len(axes))
    return tape.op("Slice", value, tape.ints(*ones), ends, tape.ints(*axes), tape.ints(*ones), like=value)


def _spread(tape: Tape, value: ir.Value, steps: dict[int, int]) -> ir.Value:
    """Put ``steps[axis] - 1`` zeros after each element along an axis."""
    steps = {axis: step for axis, step in steps.items() if step > 1}
    if not steps:
        return value
    apart, joined, widths = list[Dim](), list[Dim](), Pads()
    for axis, size in enumerate(dims(value)):
        step = steps.get(axis)
        apart += [size] if step is None else [size, 1]
        joined.append(size if step is None or not isinstance(size, int) else size * step)
        if step is not None:
            widths[len(apart) - 1] = (0, step - 1)
    return reshape(tape, pad(tape, reshape(tape, value, apart), widths), joined)


# More cells than the input has


def pad_rule(tape: Tape, site: Site) -> Grads:
    """Constant: cut what was added. Other modes: add it to where it was copied from."""
    mode = text_attribute(site.node, "mode", "constant")
    if site.wants(2):
        raise refuse(site, "the value it pads with is computed by the graph")
    widths = _widths(site)
    if mode == "constant":
        return only(site, pad(tape, site.grad, {axis: (-before, -after) for axis, (before, after) in widths.items()}))
    grad = site.grad
    for axis, width in widths.items():
        source = _padded_indices(site, axis_size(site, site.x, axis), width, mode)
        grad = contract(tape, grad, axis, one_hot(source, axis_size(site, site.x, axis)))
    return only(site, grad)


def _widths(site: Site) -> Pads:
    """(before, after) of each axis that a Pad changes. Raises ConversionError for a symbolic axis."""
    rank, pads, given = len(dims(site.x)), needed_ints(site, 1, "pads"), constant_input(site, 3, "axes")
    axes = range(rank) if given is None else [int(axis) % rank for axis in given]
    pairs = zip(axes, pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True)
    widths = {axis: (before, after) for axis, before, after in pairs if before or after}
    for axis in widths:
        axis_size(site, site.x, axis)
    return widths


def _padded_indices(site: Site, size: int, width: tuple[int, int], mode: str) -> npt.NDArray[np.int64]:
    """For each cell of a padded axis, the cell that it is a copy of; negative widths cut."""
    cells, (before, after) = np.arange(size), (max(width[0], 0), max(width[1], 0))
    if mode not in ("reflect", "edge") or (mode == "reflect" and min(width) < 0):
        raise refuse(site, f"mode {mode!r} with widths {width}")
    padded = np.pad(cells, (before, after), "reflect" if mode == "reflect" else "edge")
    return padded[max(-width[0], 0) : len(padded) - max(-width[1], 0)]


def expand(tape: Tape, site: Site) -> Grads:
    """Sum over the axes that were repeated."""
    shape, wide = dims(site.x), dims(site.y)
    extra = len(wide) - len(shape)
    repeated = [a for a, size in enumerate(wide) if a < extra or (shape[a - extra] == 1 and size != 1)]
    return only(site, _summed(tape, site.grad, repeated, shape))


def tile(tape: Tape, site: Site) -> Grads:
    """Sum over the copies."""
    repeats = needed_ints(site, 1, "repeats")
    apart, copies = list[Dim](), list[int]()
    for size, count in zip(dims(site.x), repeats, strict=True):
        if count != 1:
            copies.append(len(apart))
            apart.append(count)
        apart.append(size)
    return only(site, _summed(tape, reshape(tape, site.grad, apart), copies, dims(site.x)))


def _summed(tape: Tape, grad: ir.Value, axes: list[int], shape: Dims) -> ir.Value:
    """Sum over ``axes``, then to ``shape``."""
    if not axes:
        return reshape(tape, grad, shape)
    left = [size for axis, size in enumerate(dims(grad)) if axis not in axes]
    total = tape.op("ReduceSum", grad, tape.ints(*axes), shape=left, attributes={"keepdims": 0})
    return reshape(tape, total, shape)


def gather(tape: Tape, site: Site) -> Grads:
    """Back to where each element was taken from, added up where it was taken several times."""
    shape = dims(site.x)
    axis = int_attribute(site.node, "axis", 0) % len(shape)
    size = axis_size(site, site.x, axis)
    indices = np.array(needed_ints(site, 1, "indices"), np.int64) % size
    grad = reshape(tape, site.grad, (*shape[:axis], len(indices), *shape[axis + 1 :]))
    if sorted(indices) != list(range(size)):
        return only(site, contract(tape, grad, axis, one_hot(indices, size)))
    back = tape.ints(*(int(i) for i in np.argsort(indices)))
    return only(site, tape.op("Gather", grad, back, like=site.x, attributes={"axis": axis}))


def gather_elements(tape: Tape, site: Site) -> Grads:
    """Each part of the gradient added to where its element was taken from; the indices may be computed."""
    attributes: Attributes = {"axis": int_attribute(site.node, "axis", 0), "reduction": "add"}
    inputs = zeros_like(tape, site.x), need(site.input(1)), site.grad
    return only(site, tape.op("ScatterElements", *inputs, like=site.x, attributes=attributes))


RULES: dict[str, Rule] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": reshaped,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Pad": pad_rule,
    "Reshape": reshaped,
    "Slice": slice_,
    "Split": split,
    "Squeeze": reshaped,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": reshaped,
}
