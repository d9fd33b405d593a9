"""Gradient rules: Pooling and reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.max_pooling import Pool, max_pool, pool_of
from lorac_exporters.gradients.moves import Floats, Grads, contract, needed_ints, only, refuse, reshape, zeros_like
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import int_attribute

_TINY = 1e-30  # keeps 0 / 0 out of the gradient of a norm

# Windows


def average_pool(tape: Tape, site: Site) -> Grads:
    """Every cell gets its share of each window that it counts in.

    A mean over a rectangle is a mean along one axis after another, so its gradient is a small matrix product for
    each axis; where windows tile the image, its cells just share.
    """
    pool = pool_of(site)
    if set(pool.dilations) != {1}:
        raise refuse(site, "its windows have gaps (dilations)")
    if _tiling(pool):
        share = tape.op("Mul", site.grad, 1 / math.prod(pool.kernel), like=site.grad)
        return only(site, _repeated(tape, share, pool.kernel))
    grad = site.grad
    for axis in range(len(pool.kernel)):
        grad = contract(tape, grad, axis + 2, _mean_matrix(site, pool, axis))
    return only(site, grad)


def _tiling(pool: Pool) -> bool:
    """Whether windows neither overlap nor leave anything out."""
    covered = tuple(out * k for out, k in zip(pool.outputs, pool.kernel, strict=True))
    return pool.strides == pool.kernel and covered == pool.sizes and not any(pool.pads)


def _repeated(tape: Tape, value: ir.Value, blocks: tuple[int, ...]) -> ir.Value:
    """Repeat each spatial cell ``blocks[axis]`` times along each axis: (n, c, h, w) to (n, c, h * a, w * b)."""
    shape = dims(value)
    apart, target, wide = list(shape[:2]), [1, 1], list(shape[:2])
    for size, block in zip(sizes(value, 2), blocks, strict=True):
        apart += [size, 1]
        target += [1, block]
        wide += [size, block]
    joined = [size * block for size, block in zip(sizes(value, 2), blocks, strict=True)]
    expanded = tape.op("Expand", reshape(tape, value, apart), tape.ints(*target), shape=wide)
    return reshape(tape, expanded, (*shape[:2], *joined))


def _mean_matrix(site: Site, pool: Pool, axis: int) -> Floats:
    """(outputs, inputs) of a spatial axis: what each input cell counts in each output."""
    counting, k, size = int_attribute(site.node, "count_include_pad", 0), pool.kernel[axis], pool.sizes[axis]
    before, after = pool.pads[axis], pool.pads[axis + len(pool.kernel)]
    matrix = np.zeros((pool.outputs[axis], size), np.float32)
    for output in range(pool.outputs[axis]):
        start = output * pool.strides[axis] - before
        cells = slice(max(start, 0), min(start + k, size))
        if cells.start >= cells.stop:
            raise refuse(site, "one of its windows lies outside the image")
        if counting and start + k > size + after:
            raise refuse(site, "releases of onnxruntime disagree on windows beyond the padding that counts")
        matrix[output, cells] = 1 / (k if counting else cells.stop - cells.start)
    return matrix


# Whole axes


def global_average_pool(tape: Tape, site: Site) -> Grads:
    """An equal share for each cell."""
    return only(site, _mean_back(tape, site, site.grad, range(2, len(dims(site.x)))))


def global_max_pool(tape: Tape, site: Site) -> Grads:
    """All to the first largest cell of an image."""
    shape = dims(site.x)
    flat = (*shape[:2], math.prod(sizes(site.x, 2)))
    column = (*shape[:2], 1)
    x = reshape(tape, site.x, flat)
    first = tape.op("ArgMax", x, shape=column, dtype=ir.DataType.INT64, attributes={"axis": 2, "keepdims": 1})
    grad = reshape(tape, site.grad, column)
    placed = tape.op("ScatterElements", zeros_like(tape, x), first, grad, like=x, attributes={"axis": 2})
    return only(site, reshape(tape, placed, shape))


def reduce_mean(tape: Tape, site: Site) -> Grads:
    """An equal share for each element."""
    return only(site, _mean_back(tape, site, _kept(tape, site, site.grad), _axes(site)))


def reduce_sum(tape: Tape, site: Site) -> Grads:
    """The same for each element."""
    return only(site, _spread(tape, site, _kept(tape, site, site.grad), _axes(site)))


def reduce_extreme(tape: Tape, site: Site) -> Grads:
    """Equal shares for all largest (smallest) elements, as `torch.amax` does."""
    axes = _axes(site)
    if not axes:
        return only(site, site.grad)
    grad, y = (_kept(tape, site, value) for value in (site.grad, site.y))
    same = tape.op("Equal", site.x, y, like=site.x, dtype=ir.DataType.BOOL)
    mask = tape.op("Cast", same, like=site.x, attributes={"to": ir.DataType.FLOAT.value})
    count = tape.op("ReduceSum", mask, tape.ints(*axes), like=y, attributes={"keepdims": 1})
    return only(site, tape.op("Mul", mask, tape.op("Div", grad, count, like=y), like=site.x))


def reduce_l2(tape: Tape, site: Site) -> Grads:
    """x / y, and 0 where all of x is 0."""
    y = _kept(tape, site, _reduced(site))
    share = tape.op("Div", _kept(tape, site, site.grad), tape.op("Max", y, _TINY, like=y), like=y)
    return only(site, tape.op("Mul", site.x, share, like=site.x))


def reduce_sum_square(tape: Tape, site: Site) -> Grads:
    """2 x."""
    grad = _kept(tape, site, site.grad)
    _reduced(site)
    return only(site, tape.op("Mul", site.x, tape.op("Mul", grad, 2.0, like=grad), like=site.x))


def reduce_log_sum_exp(tape: Tape, site: Site) -> Grads:
    """softmax(x) = exp(x - y)."""
    grad, y = _kept(tape, site, site.grad), _kept(tape, site, _reduced(site))
    share = tape.op("Exp", tape.op("Sub", site.x, y, like=site.x), like=site.x)
    return only(site, tape.op("Mul", share, grad, like=site.x))


def _reduced(site: Site) -> ir.Value:
    """The output. Raises ConversionError where nothing is reduced: runtimes then disagree on what is computed."""
    if not _axes(site):
        raise refuse(site, "it reduces no axis")
    return site.y


def _axes(site: Site) -> list[int]:
    """The axes that a reduction sums over, ascending."""
    rank = len(dims(site.x))
    given = [] if site.input(1) is None else needed_ints(site, 1, "axes")
    if not given and not int_attribute(site.node, "noop_with_empty_axes", 0):
        return list(range(rank))
    return sorted(axis % rank for axis in given)


def _kept(tape: Tape, site: Site, value: ir.Value) -> ir.Value:
    """A reduced value with its reduced axes as axes of size 1."""
    axes = _axes(site)
    return reshape(tape, value, [1 if axis in axes else size for axis, size in enumerate(dims(site.x))])


def _mean_back(tape: Tape, site: Site, grad: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Equal shares of ``grad`` (1 along the axes) for all elements."""
    counts = [dims(site.x)[axis] for axis in axes]
    share = tape.op("Mul", grad, 1 / math.prod(count for count in counts if isinstance(count, int)), like=grad)
    for axis in axes:
        if not isinstance(dims(site.x)[axis], int):
            share = tape.op("Div", share, _size_of_axis(tape, site.x, axis), like=grad)
    return _spread(tape, site, share, axes)


def _size_of_axis(tape: Tape, value: ir.Value, axis: int) -> ir.Value:
    """A symbolic size as a float, of shape (1,)."""
    found = {"start": axis, "end": axis + 1}
    size = tape.op("Shape", value, shape=(1,), dtype=ir.DataType.INT64, attributes=found)
    return tape.op("Cast", size, shape=(1,), attributes={"to": ir.DataType.FLOAT.value})


def _spread(tape: Tape, site: Site, grad: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Repeat ``grad`` (1 along the axes) to the input's shape."""
    shape = dims(site.x)
    if all(isinstance(shape[axis], int) for axis in axes):
        target = tape.ints(*(size if axis in axes and isinstance(size, int) else 1 for axis, size in enumerate(shape)))
    else:
        target = tape.op("Shape", site.x, shape=(len(shape),), dtype=ir.DataType.INT64)
    return tape.op("Expand", grad, target, like=site.x)


RULES: dict[str, Rule] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "MaxPool": max_pool,
    "ReduceL2": reduce_l2,
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceMax": reduce_extreme,
    "ReduceMean": reduce_mean,
    "ReduceMin": reduce_extreme,
    "ReduceSum": reduce_sum,
    "ReduceSumSquare": reduce_sum_square,
}
