"""The low-rank update of a weight, written once for numpy and torch.

Source: LoRA-C (Ding et al., arXiv 2410.16954): ``W = W0 + s * Reshape(B A)``, ``s = alpha / r``.
A weight has the shape (c_out, c_in/groups, k_h, k_w); a 1-D convolution counts as k_h = 1, the weight (c_out, c_in)
of a fully connected layer as k_h = k_w = 1.

The output channels may be shared out among several ``pairs`` of factors, c_out / pairs each: the paper's kernel-wise
ablation has a pair for each output channel, A_i (r, c_in/groups * k_w) and B_i (k_h, r). The pairs are stacked along
the rows of ``lora_a`` and of ``lora_b``.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

Layout = Literal["paper", "spatial"]
RankMode = Literal["rk", "r", "auto"]
LAYOUTS: tuple[Layout, ...] = ("spatial", "paper")
RANK_MODES: tuple[RankMode, ...] = ("auto", "rk", "r")
AUTO_RANK_LIMIT = 22_500_000  # backbone parameters; between ResNet-34 (21.3 M) and ResNet-50 (23.5 M)

Array = TypeVar("Array", bound=Any)  # numpy.ndarray or torch.Tensor


def conv_dims(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(c_out, c_in/groups, k_h, k_w) of a weight; 1-D kernels get k_h = 1, fully connected layers k_w = 1 too.

    >>> conv_dims((8, 4, 3)), conv_dims((8, 4))
    ((8, 4, 1, 3), (8, 4, 1, 1))

    Raises ValueError for a weight of any other kind of layer.
    """
    if len(shape) == 2:
        return (shape[0], shape[1], 1, 1)
    if len(shape) == 3:
        return (shape[0], shape[1], 1, shape[2])
    if len(shape) != 4:
        raise ValueError(
            f"a weight that takes an adapter has 2, 3 or 4 dimensions, got shape {tuple(shape)}; low-rank adapters "
            "exist for fully connected layers and 1-D and 2-D convolutions"
        )
    return (shape[0], shape[1], shape[2], shape[3])


def resolve_rank_mode(mode: RankMode, backbone_parameters: int) -> Literal["rk", "r"]:
    """``auto`` is ``rk`` below 22.5 M backbone parameters (the head not counted), else ``r``.

    >>> resolve_rank_mode("auto", 11_164_352), resolve_rank_mode("auto", 23_500_352)
    ('rk', 'r')
    """
    if mode not in RANK_MODES:
        raise ValueError(f"rank mode {mode!r} is not one of {', '.join(RANK_MODES)}")
    if mode != "auto":
        return mode
    return "rk" if backbone_parameters < AUTO_RANK_LIMIT else "r"


def adapter_rank(r: int, shape: tuple[int, ...], mode: Literal["rk", "r"]) -> int:
    """Inner dimension of B A with one pair: r * k_w (mode ``rk``) or r, never above what the weight can hold.

    Kernel-wise it is r, as the paper counts, also where a single kernel cannot hold so much.

    >>> adapter_rank(4, (64, 64, 3, 3), "rk"), adapter_rank(4, (64, 1, 3, 3), "rk")
    (12, 3)

    Raises ValueError if r is below 1.
    """
    if r < 1:
        raise ValueError(f"rank must be at least 1, got {r}")
    c_out, c_in, k_h, k_w = conv_dims(shape)
    wanted = r * k_w if mode == "rk" else r
    return min(wanted, c_out * k_h, c_in * k_w)


def adapter_shapes(shape: tuple[int, ...], rank: int, pairs: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of ``lora_a`` (pairs * rank, c_in/groups * k_w) and ``lora_b`` (c_out * k_h, rank).

    >>> adapter_shapes((64, 32, 3, 3), 12), adapter_shapes((64, 32, 3, 3), 2, pairs=64)
    (((12, 96), (192, 12)), ((128, 96), (192, 2)))

    Raises ValueError if the output channels cannot be shared out evenly among the pairs.
    """
    c_out, c_in, k_h, k_w = conv_dims(shape)
    if pairs < 1 or c_out % pairs:
        raise ValueError(f"{pairs} pairs of factors cannot share {c_out} output channels; expected a divisor of it")
    return (pairs * rank, c_in * k_w), (c_out * k_h, rank)


def adapter_size(shape: tuple[int, ...], rank: int, pairs: int = 1) -> int:
    """Number of elements of ``lora_a`` and ``lora_b``: (pairs * c_in/groups * k_w + c_out * k_h) * rank.

    >>> adapter_size((64, 64, 3, 3), 12), adapter_size((64, 64, 3, 3), 2, pairs=64)
    (4608, 24960)
    """
    (rows_a, columns), (rows, _) = adapter_shapes(shape, rank, pairs)
    return rows_a * columns + rows * rank


def is_smaller_than_weight(shape: tuple[int, ...], rank: int, pairs: int = 1) -> bool:
    """Whether an adapter of this rank has fewer elements than the weight it updates.

    >>> is_smaller_than_weight((64, 64, 3, 3), 12), is_smaller_than_weight((64, 1, 3, 3), 3)
    (True, False)
    """
    return adapter_size(shape, rank, pairs) < math.prod(shape)


def delta(a: Array, b: Array, shape: tuple[int, ...], scale: float | Array, layout: Layout, *, pairs: int = 1) -> Array:
    """``scale * arrange(b @ a)`` in the shape of the weight (LoRA-C, eq. of W = W0 + s Reshape(B A)).

    ``a`` is (pairs * rank, c_in/groups * k_w), ``b`` is (c_out * k_h, rank); both numpy or both torch.
    ``paper`` is the raw reshape of the published code. ``spatial`` gives element
    [o, i, u, v] = sum_r b[o * k_h + u, r] * a[p * rank + r, i * k_w + v], p the pair of channel o: with one pair a thin
    1 x k_w convolution followed by a k_h x 1 one. Both have the same size and rank; they are different maps and are
    never mixed. Where k_h = 1, as in fully connected layers, they are the same.

    >>> import numpy as np
    >>> a, b = np.ones((2, 6)), np.ones((12, 2))
    >>> delta(a, b, (4, 2, 3, 3), 0.5, "spatial").shape
    (4, 2, 3, 3)

    Raises ValueError for an unknown layout or factors that do not belong to ``shape``.
    """
    rank = b.shape[-1]
    expected = adapter_shapes(shape, rank, pairs)
    if (tuple(a.shape), tuple(b.shape)) != expected:
        (_, columns), (rows, _) = expected
        first = "rank" if pairs == 1 else f"{pairs} * rank"
        raise ValueError(
            f"lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not fit weight {tuple(shape)}: "
            f"expected ({first}, {columns}) and ({rows}, rank)"
        )
    result: Array = arrange(product(a, b, pairs), shape, layout) * scale
    return result


def product(a: Array, b: Array, pairs: int = 1) -> Array:
    """B A pair by pair, (c_out * k_h, c_in/groups * k_w): rows of one pair's ``b`` see rows of its ``a`` alone.

    >>> import numpy as np
    >>> product(np.array([[1.0], [10.0]]), np.array([[2.0], [3.0]]), pairs=2).ravel().tolist()
    [2.0, 30.0]
    """
    if pairs == 1:
        result: Array = b @ a
    else:
        stacked = b.reshape(pairs, -1, b.shape[1]) @ a.reshape(pairs, -1, a.shape[1])
        result = stacked.reshape(b.shape[0], a.shape[1])
    return result


def arrange(product: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """Arrange ``b @ a``, (c_out * k_h, c_in/groups * k_w), as a weight of ``shape`` (see `delta`).

    >>> import numpy as np
    >>> m = np.arange(4.0).reshape(2, 2)                     # c_out = 1, c_in = 1, 2 x 2 kernel
    >>> arrange(m, (1, 1, 2, 2), "spatial")[0, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    c_out, c_in, k_h, k_w = conv_dims(shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "spatial":
        product = product.reshape(c_out, k_h, c_in, k_w).swapaxes(1, 2)
    result: Array = product.reshape(shape)
    return result
