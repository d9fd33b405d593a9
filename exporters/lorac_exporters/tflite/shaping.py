"""Reshape, Transpose, Squeeze, Unsqueeze, Expand, Tile: a Transpose renames axes, a Reshape keeps the stored order
wherever the numbers allow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.graph_tools import array, input_at, ints_attribute, need
from lorac_exporters.tflite.arranging import completed, real_axes, reshaped
from lorac_exporters.tflite.elementwise import alias
from lorac_exporters.tflite.lowering import Layout, Lowering, Rule, Stored, channels_last, plain


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes ``before`` a reshape that hold the same numbers, in the same order, as axes ``after`` it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def groups_of(before: Sequence[int], after: Sequence[int], *, batch: bool) -> list[Group]:
    """The smallest groups of axes that a reshape maps on each other; axes of size 1 belong to none.

    With ``batch``, the first axis of both is the batch.

    >>> groups_of((1, 6, 4, 4), (1, 2, 3, 16), batch=True)
    [Group(before=(0,), after=(0,)), Group(before=(1,), after=(1, 2)), Group(before=(2, 3), after=(3,))]

    Raises ValueError if the sizes do not match.
    """
    left = [axis for axis in range(batch, len(before)) if before[axis] != 1]
    right = [axis for axis in range(batch, len(after)) if after[axis] != 1]
    groups = [Group((0,), (0,))] if batch else []
    while left or right:
        if not (left and right):
            raise ValueError(f"{tuple(before)} cannot be reshaped to {tuple(after)}")
        one, two = [left.pop(0)], [right.pop(0)]
        size, other = before[one[0]], after[two[0]]
        while size != other:
            if size < other and left:
                one.append(left.pop(0))
                size *= before[one[-1]]
            elif other < size and right:
                two.append(right.pop(0))
                other *= after[two[-1]]
            else:
                raise ValueError(f"{tuple(before)} cannot be reshaped to {tuple(after)}")
        groups.append(Group(tuple(one), tuple(two)))
    return groups


def stored_result(layout: Layout, groups: Sequence[Group], rank: int) -> Layout | None:
    """The layout after a reshape of what lies in ``layout``; None if a group of axes does not lie together, in order.

    ``rank``: number of axes after.

    >>> groups = groups_of((1, 6, 4, 4), (1, 2, 3, 4, 4), batch=True)
    >>> stored_result((0, 2, 3, 1), groups, 5)
    (0, 3, 4, 1, 2)
    """
    first = {group.before[0]: group for group in groups}
    real = {axis for group in groups for axis in group.before}
    order = [axis for axis in layout if axis in real]
    result: list[int] = []
    while order:
        group = first.get(order[0])
        if group is None or tuple(order[: len(group.before)]) != group.before:
            return None
        result += group.after
        order = order[len(group.before) :]
    return completed(tuple(result), rank, frozenset(result))


def orders_before(groups: Sequence[Group], before: int, after: int) -> list[Layout]:
    """Layouts from which a reshape of ``before`` to ``after`` axes can start; first one that ends channels-last."""
    orders = []
    for wanted in (channels_last(after), plain(after)):
        backwards = [Group(group.after, group.before) for group in groups]
        found = stored_result(wanted, backwards, before)
        if found is not None:
            orders.append(found)
    return orders


def reshape(lowering: Lowering, node: ir.Node) -> None:
    """Any change of shape that keeps the order of numbers in ONNX; a TRANSPOSE only where storage forces one."""
    value, out = need(node.inputs[0]), node.outputs[0]
    before, after = lowering.dims(value), lowering.dims(out)
    batch = lowering.has_batch(value)
    if batch != lowering.has_batch(out):
        raise lowering.refuse(node, "it changes the batch axis")
    try:
        groups = groups_of(before, after, batch=batch)
    except ValueError as err:
        raise lowering.refuse(node, f"it mixes the batch with other axes: {value.shape} to {out.shape}") from err
    found = lowering.stored(value)
    layout = stored_result(found.layout, groups, len(after))
    if layout is None:
        found = lowering.stored(value, orders_before(groups, len(before), len(after))[0])
        layout = stored_result(found.layout, groups, len(after))
    assert layout is not None, "plain order always lies together"
    shape = tuple(after[axis] for axis in layout)
    batch_axis = layout.index(0) if batch else None
    lowering.bind(out, reshaped(lowering, found.tensor, shape, batch_axis, name=str(out.name)), layout)


def _transpose(lowering: Lowering, node: ir.Node) -> None:
    """Axes get other names; nothing moves."""
    found = lowering.stored(need(node.inputs[0]))
    order = ints_attribute(node, "perm", tuple(reversed(range(len(found.layout)))))
    renamed = tuple(order.index(axis) for axis in found.layout)
    lowering.bind(node.outputs[0], found.tensor, renamed)


def _repeat(lowering: Lowering, node: ir.Node) -> None:
    """Expand and Tile. TILE leaves the batch free, which BROADCAST_TO would not."""
    value, out = need(node.inputs[0]), node.outputs[0]
    before, after = lowering.dims(value), lowering.dims(out)
    numbers = array(input_at(node, 1))
    if numbers is None:
        raise lowering.refuse(node, f"its sizes are computed by {need(node.inputs[1]).name!r}")
    changed = lowering.has_batch(value) and len(numbers) == len(after) and int(numbers[0]) != 1
    if changed or lowering.has_batch(value) != lowering.has_batch(out):
        raise lowering.refuse(node, "it repeats the batch, whose size is free")
    found = _widened(lowering, value, len(after))
    before = (1,) * (len(after) - len(before)) + before
    multiples = [after[axis] // before[axis] for axis in found.layout]
    if multiples == [1] * len(after):
        return lowering.bind(out, found.tensor, found.layout)
    counts = lowering.ints(f"{out.name}_multiples", multiples)
    lowering.emit_for("TILE", [found.tensor, counts], out, found.layout)
    return None


def _widened(lowering: Lowering, value: ir.Value, rank: int) -> Stored:
    """A value with axes of size 1 added on the left, up to ``rank``."""
    found = lowering.stored(value)
    surplus = rank - len(found.layout)
    if not surplus:
        return found
    real = frozenset(axis + surplus for axis in real_axes(lowering, value))
    layout = completed(tuple(axis + surplus for axis in found.layout), rank, real)
    dims = (1,) * surplus + lowering.dims(value)
    return Stored(reshaped(lowering, found.tensor, [dims[axis] for axis in layout], None), layout)


RULES: dict[str, Rule] = {
    "Expand": _repeat,
    "Identity": alias,
    "Squeeze": reshape,
    "Tile": _repeat,
    "Transpose": _transpose,
    "Unsqueeze": reshape,
}
