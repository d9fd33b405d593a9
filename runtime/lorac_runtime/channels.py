"""A tensor's final value in blocks of output channels, computed as they are asked for.

Fusing a model this way needs memory for a block, not for the model: blocks are computed, stored and forgotten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Elements of a block, as float32 256 KiB: it stays in the cache.
BLOCK = 1 << 16


class Scratch:
    """Memory that the blocks of a tensor share, one after the other.

    Asking the system for fresh pages for each block took three times as long as the arithmetic.
    """

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        """Float32 memory of ``shape`` with anything in it, the same for the same ``name``."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size, np.float32)
        return self._held[name][:size].reshape(shape)


Rows = Callable[[int, int, Scratch], Array]


@dataclasses.dataclass(frozen=True)
class Channels:
    """A float32 tensor of ``shape`` whose ``rows(o, p, scratch)`` are its channels o to p along the first axis.

    ``o`` is a multiple of ``step``, and ``p`` too or the number of channels: so every way of cutting a tensor into
    blocks does the same arithmetic and gives the same bits. What `rows` gives may lie in ``scratch``.
    """

    shape: tuple[int, ...]
    rows: Rows
    step: int = 1

    @classmethod
    def of(cls, value: Array) -> Channels:
        """A tensor that is there; its blocks are views.

        >>> [block.tolist() for block in Channels.of(np.arange(4.0).reshape(2, 2)).blocks(2)]
        [[[0.0, 1.0]], [[2.0, 3.0]]]
        """
        rows = value.reshape(1) if value.ndim == 0 else value
        return cls(value.shape, lambda o, p, _: rows[o:p])

    @property
    def count(self) -> int:
        """How many channels there are; a number without axes is one."""
        return self.shape[0] if self.shape else 1

    def blocks(self, elements: int = BLOCK) -> Iterator[Array]:
        """All channels in order, about so many ``elements`` at a time. A block is gone when the next one is taken."""
        channel, scratch = max(1, math.prod(self.shape[1:])), Scratch()
        length = max(1, elements // (channel * self.step)) * self.step
        for o in range(0, self.count, length):
            yield self.rows(o, min(o + length, self.count), scratch)

    def whole(self) -> Array:
        """The tensor at once."""
        return self.rows(0, self.count, Scratch()).reshape(self.shape)
