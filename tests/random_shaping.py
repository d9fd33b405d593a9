"""Layers of random networks without weights: pools, resizing, and whatever moves numbers to other places."""

from __future__ import annotations

import math

from random_graph import Graph, Value
from random_layers import linear, pointwise


def pool(g: Graph, x: Value) -> Value:
    """MaxPool or AveragePool with any window, uneven padding, ceil_mode, count_include_pad."""
    windows = [_window(g, size) for size in x.shape[1:]]
    ceil = int(g.chance(0.4) and all(_ends_inside(*window) for window in windows))
    op = g.choice(["MaxPool", "AveragePool"])
    beyond = ceil and any(_pooled(*window, 1) > _pooled(*window, 0) for window in windows)
    # What a window that reaches beyond the padding counts, onnxruntime 1.19.2 and PyTorch do not agree on.
    attributes = {"count_include_pad": 0 if beyond else g.integer(0, 1)} if op == "AveragePool" else {}
    _, kernels, strides, before, after = (list(numbers) for numbers in zip(*windows, strict=True))
    if ceil:
        g.note(f"{op}, ceil_mode")
    if before != after:
        g.note(f"{op}, padded unevenly")
    if attributes.get("count_include_pad") and any(before + after):
        g.note(f"{op}, counting padding")
    shape = (x.channels, *(_pooled(*window, ceil) for window in windows))
    pads = [*before, *after]
    return g.add(op, [x], shape, kernel_shape=kernels, strides=strides, pads=pads, ceil_mode=ceil, **attributes)


def _window(g: Graph, size: int) -> tuple[int, int, int, int, int]:
    """Size of the map, kernel, stride, and padding at both ends."""
    kernel = g.integer(1, min(4, size))
    before, after = (g.integer(0, kernel // 2) if g.chance(0.6) else 0 for _ in range(2))
    return size, kernel, g.integer(1, 3), before, after


def _pooled(size: int, kernel: int, stride: int, before: int, after: int, ceil: int) -> int:
    span = size + before + after - kernel
    return (-(-span // stride) if ceil else span // stride) + 1


def _ends_inside(size: int, kernel: int, stride: int, before: int, after: int) -> bool:
    """Whether with ceil_mode the last window begins on the map: frameworks disagree on one that does not."""
    return (_pooled(size, kernel, stride, before, after, 1) - 1) * stride < size + before


def reduce(g: Graph, x: Value) -> Value | None:
    """What channels or positions have in common, taken away from each."""
    op = g.choice(["ReduceMean", "ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin"])
    axes = g.choice([[1], [2], [3], [2, 3], [1, 2, 3]])
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape, start=1))
    size = math.prod(x.shape) // math.prod(shape)
    if size == 1:
        return None
    common = g.add(op, [x, g.constant(axes)], shape, keepdims=1)
    if op == "ReduceSum":
        common = g.add("Mul", [common, g.floats(1 / size)], shape)
    return g.add("Sub", [x, common], x.shape, form="broadcast")


def resize(g: Graph, x: Value) -> Value | None:
    """Nearest or linear; by scales, or to sizes of two axes."""
    if max(x.shape[1:]) > 13:
        return None
    mode, coordinates, nearest = g.choice(
        [
            ("nearest", "asymmetric", "floor"),
            ("nearest", "half_pixel", "round_prefer_floor"),
            ("linear", "half_pixel", "floor"),
            ("linear", "align_corners", "floor"),
            ("linear", "asymmetric", "floor"),
            ("linear", "pytorch_half_pixel", "floor"),
        ]
    )
    scale = g.integer(1, 2), g.integer(2, 3)
    shape = (x.channels, *(size * s for size, s in zip(x.shape[1:], scale, strict=True)))
    chosen = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": nearest}
    form = f"{mode} {coordinates}"
    if g.chance(0.5):
        return g.add("Resize", [x, "", g.floats([1, 1, *scale])], shape, form=form, **chosen)
    sizes = g.constant(shape[1:])
    return g.add("Resize", [x, "", "", sizes], shape, form=form, axes=[2, 3], **chosen)


def depth_to_space(g: Graph, x: Value) -> Value | None:
    """PixelShuffle and its TensorFlow cousin, behind the convolution that makes the channels."""
    if max(x.shape[1:]) > 10:
        return None
    block, mode, c = g.integer(2, 3), g.choice(["DCR", "CRD"]), g.integer(1, 3)
    deep = pointwise(g, x, c * block**2)
    shape = (c, *(size * block for size in x.shape[1:]))
    return g.add("DepthToSpace", [deep], shape, form=mode, blocksize=block, mode=mode)


def space_to_depth(g: Graph, x: Value) -> Value | None:
    c, h, w = x.shape
    if h % 2 or w % 2 or c > 6:
        return None
    return g.add("SpaceToDepth", [x], (4 * c, h // 2, w // 2), blocksize=2)


def pad(g: Graph, x: Value) -> Value:
    """Constant or reflected, uneven; now and then only some axes are named, or channels are padded."""
    mode = g.choice(["constant", "constant", "reflect"])
    limit = 3 if mode == "constant" else min(*x.shape[1:], 4) - 1
    before, after = ([g.integer(0, max(0, min(2, limit))) for _ in range(2)] for _ in range(2))
    deep = g.integer(0, 2) if mode == "constant" and g.chance(0.2) else 0
    c, h, w = x.shape
    shape = (c + deep, h + before[0] + after[0], w + before[1] + after[1])
    pads = [0, 0, *before, 0, deep, *after]
    if deep == 0 and g.chance(0.3):
        inputs = [x, g.constant([*before, *after]), "", g.constant([2, 3])]
        return g.add("Pad", inputs, shape, form=f"{mode}, of named axes", mode=mode)
    value = g.floats(g.choice([0.0, 0.0, 0.5])) if mode == "constant" else ""
    return g.add("Pad", [x, g.constant(pads), value], shape, form=mode, mode=mode)


def slices(g: Graph, x: Value) -> Value:
    """A part of one or two axes, counted from either end, with steps."""
    shape, starts, ends, axes, steps = list(x.shape), [], [], [], []
    for axis in sorted(set(g.rng.integers(0, 3, g.integer(1, 2)).tolist())):
        size = shape[axis]
        start, step = g.integer(0, (size - 1) // 2), g.choice([1, 1, 2])
        end = g.integer(start + 1, size)
        shape[axis] = -(-(end - start) // step)
        starts.append(start - size if g.chance(0.3) else start)
        ends.append(2**31 - 1 if end == size else end - size if g.chance(0.3) else end)
        axes.append(axis + 1)
        steps.append(step)
    inputs = [x, *(g.constant(numbers) for numbers in (starts, ends, axes, steps))]
    return g.add("Slice", inputs, shape, form="with steps" if max(steps) > 1 else "")


def split(g: Graph, x: Value) -> Value | None:
    """In two parts along any axis, joined the other way round or one gating the other."""
    axis = g.choice([1, 1, 1, 2, 3])
    size = x.shape[axis - 1]
    if size < 2:
        return None
    first = size // 2 if g.chance(0.5) else g.integer(1, size - 1)
    shapes = [tuple(n if i == axis - 1 else d for i, d in enumerate(x.shape)) for n in (first, size - first)]
    a, b = g.split("Split", [x, g.constant([first, size - first])], shapes, axis=axis)
    if first * 2 == size and g.chance(0.5):
        return g.add("Mul", [a, g.add("Sigmoid", [b], b.shape)], a.shape, form="of a part")
    return g.add("Concat", [b, a], x.shape, form=f"axis {axis}", axis=axis)


def shuffle(g: Graph, x: Value) -> Value | None:
    """ShuffleNet's exchange of channels between groups."""
    c, h, w = x.shape
    groups = [d for d in (2, 3, 4) if c % d == 0 and d < c]
    if not groups:
        return None
    n, free = g.choice(groups), g.choice([0, -1])
    apart = g.add("Reshape", [x, g.constant([free, n, c // n, h, w])], (n, c // n, h, w), form="5 axes")
    turned = g.add("Transpose", [apart], (c // n, n, h, w), form="5 axes", perm=[0, 2, 1, 3, 4])
    return g.add("Reshape", [turned, g.constant([free, c, h, w])], x.shape)


def gather(g: Graph, x: Value) -> Value:
    """Channels in another order, some of them twice."""
    order = g.rng.integers(0, x.channels, g.integer(2, 6))
    return g.add("Gather", [x, g.constant(order)], (len(order), *x.shape[1:]), axis=1)


def tokens(g: Graph, x: Value) -> Value:
    """Positions in a row, a linear layer over channels, and back to a map."""
    c, h, w = x.shape
    width = g.integer(2, 6)
    row = g.add("Reshape", [x, g.constant([g.choice([0, -1]), c, h * w])], (c, h * w), form="positions in a row")
    turned = g.add("Transpose", [row], (h * w, c), form="3 axes", perm=[0, 2, 1])
    mixed = linear(g, turned, width)
    back = g.add("Transpose", [mixed], (width, h * w), form="3 axes", perm=[0, 2, 1])
    return g.add("Reshape", [back, g.constant([-1, width, h, w])], (width, h, w), form="to a map")


def turned(g: Graph, x: Value) -> Value:
    """Height and width exchanged."""
    c, h, w = x.shape
    return g.add("Transpose", [x], (c, w, h), form="of positions", perm=[0, 1, 3, 2])
